"""Training of Llama-MTSK under Lightning: projectors, adapters and markers, over frozen encoders and language model.

Source: Llama-MTSK (arXiv 2503.06362), sections 3 and 4.1: every pair of rates in every step with equal weights, AdamW
(0.9, 0.98) with weight decay 0.1, a cosine to zero over all steps without warm-up, gradients clipped at 10. What
differs: scales run forward and backward one by one after one pass of the encoders (`scales`), the loss is not divided
again by the batch size, a step may take a drawn few of the scales instead of all, a language model that is too small to
be prompted may be trained along, and validation reads texts at the finest and the coarsest rates of development data.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.evaluation.wer import word_errors
from tokenthrift.mtsk.config import LoraConfig, Task, VideoConfig
from tokenthrift.mtsk.data import Batch
from tokenthrift.mtsk.lora import Lora, Strategy
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.pretrained import assemble
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.scales import backward_by_scale
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.sources import fetch

__all__ = ["MtskModule", "carried_over", "visual_encoder"]

AVHUBERT_FILE = "avhubert.safetensors"


class MtskModule(L.LightningModule):
    """Trains one model for many rates, or for one.

    Args:
        language_model: transformers checkpoint of a Llama or Qwen, folder or Hub id.
        whisper: transformers checkpoint of an English Whisper; None for a model that only reads lips.
        avhubert: folder or Hub id of `avhubert.safetensors`; None for a model that only listens.
        bos: token that starts a sequence; an empty string for a language model that has none.
        eos: token that ends a text.
        tasks: asr, vsr and avsr, or some of them.
        audio_rates: encoder states (50 a second) per token.
        video_rates: encoder states (25 a second) per token.
        strategy: adapters for all scales (MS), one per scale (SS), or both (MSS).
        bottleneck: of the adapters.
        lora_scale: factor of an adapter's output.
        compression: mean of states (average) or one after another (stack).
        projector_width: between the two layers of a projector.
        video_lora: bottleneck of adapters in the visual encoder, 0 for none.
        include_frozen: keep encoders and language model in the model's own files instead of naming where they lie.
        train_language_model: train the language model too, for one too small to be prompted.
        scales_per_step: scales drawn for each step; all of them if not given, as published.
        learning_rate: at the first step.
        weight_decay: of matrices.
        gradient_clip: largest norm of the gradient.
        warmup_steps: steps of linear warm-up.
        start_from: model folder or training checkpoint to begin with; a projector that it has not comes from that of
            its nearest rate. The schedule starts anew.
        seed: of the draw of scales.
    """

    def __init__(
        self,
        language_model: str,
        whisper: str | None = "openai/whisper-small.en",
        avhubert: str | None = None,
        bos: str = "<|begin_of_text|>",
        eos: str = "<|end_of_text|>",
        tasks: list[Task] | None = None,
        audio_rates: list[int] | None = None,
        video_rates: list[int] | None = None,
        strategy: Strategy = "MS",
        bottleneck: int = 64,
        lora_scale: float = 0.125,
        compression: str = "average",
        projector_width: int = 2048,
        video_lora: int = 0,
        include_frozen: bool = False,
        train_language_model: bool = False,
        scales_per_step: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        gradient_clip: float = 10.0,
        warmup_steps: int = 0,
        start_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # a step has a backward pass per scale
        tokenizer = Tokenizer.from_file(str(fetch(language_model, ("tokenizer.json",)) / "tokenizer.json"))
        video, weights = (None, None) if avhubert is None else visual_encoder(avhubert, include_frozen, video_lora)
        self.model = assemble(
            language_model,
            whisper=whisper,
            video=video,
            bos_id=_token(tokenizer, bos) if bos else None,
            eos_id=_token(tokenizer, eos),
            include_frozen=include_frozen,
            tasks=tuple(tasks or ["avsr"]),
            audio_rates=tuple(audio_rates or [4, 16]),
            video_rates=tuple(video_rates or [2, 5]),
            compression=compression,
            projector_width=projector_width,
            lora=LoraConfig(strategy=strategy, bottleneck=bottleneck, scale=lora_scale),
        )
        if weights is not None and self.model.video_encoder is not None:
            self.model.video_encoder.load_state_dict(weights)
        if train_language_model:
            self.model.language_model.requires_grad_(True)
        if start_from is not None:
            self.model.load_state_dict(carried_over(self.model, _weights_of(start_from)))

    def configure_optimizers(self) -> Any:
        """AdamW, warm-up and a cosine to zero."""
        h: Any = self.hparams
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": h.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], h.learning_rate, (0.9, 0.98), 1e-8)
        steps = int(self.trainer.estimated_stepping_batches)
        decay: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - h.warmup_steps))
        if h.warmup_steps:
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, 1.0, h.warmup_steps)
            decay = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [h.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def encoded(self, batch: Batch) -> Encoded:
        """The states of a batch, as they come or from the encoders."""
        if batch.audio_lengths is None and batch.video_lengths is None:
            audio, video = (v if isinstance(v, list) else None for v in (batch.audio, batch.video))
            # A stream that the model does not take is left alone.
            audio = audio if self.model.audio_encoder is not None else None
            video = video if self.model.video_encoder is not None else None
            return self.model.encode(audio, video)
        states = {n: getattr(batch, n) for n in ("audio", "audio_lengths", "video", "video_lengths")}
        return Encoded(**{name: value for name, value in states.items() if value is not None})

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """One step on all scales, or on a drawn few; returns their mean loss."""
        h: Any = self.hparams
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        ids = [self.model.token_ids(text) for text in batch.texts]
        scales = list(self.model.config.scales)
        if h.scales_per_step is not None:
            draw = random.Random(f"{h.seed}-{self.global_step}")
            scales = draw.sample(scales, min(h.scales_per_step, len(scales)))
        optimizer.zero_grad()
        losses = backward_by_scale(
            lambda encoded, rates: self.model.loss(encoded, ids, rates),
            self.encoded(batch),
            scales,
            backward=self.manual_backward,
        )
        weights = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, h.gradient_clip)
        optimizer.step()
        schedule.step()
        loss = torch.stack(list(losses.values())).mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/norm", norm)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forgets the texts of the last validation."""
        self.read: dict[Rates, list[tuple[str, str]]] = {}

    def validation_step(self, batch: Batch, index: int) -> None:
        """The loss at every scale; texts at the first and the last scale of the first task."""
        encoded = self.encoded(batch)
        ids = [self.model.token_ids(text) for text in batch.texts]
        scales = self.model.config.scales
        for rates in scales:
            self.log(f"val/loss_{_name(rates)}", self.model.loss(encoded, ids, rates), batch_size=len(ids))
        read = list(dict.fromkeys([scales[0], self.coarsest()]))
        # A few tokens more than the truth has, so that a model that never stops costs little.
        for rates, rows in self.model.write_all(encoded, read, [len(row) + 8 for row in ids]).items():
            texts = [self.model.text_of(row.ids) for row in rows]
            self.read.setdefault(rates, []).extend(zip(batch.texts, texts, strict=True))

    def on_validation_epoch_end(self) -> None:
        """Word error rates at the finest and the coarsest scale, and their mean."""
        rates_wer = []
        for rates, rows in self.read.items():
            truth, found = zip(*rows, strict=True)
            rates_wer.append(word_errors(truth, found, str).rate)
            self.log(f"val/wer_{_name(rates)}", rates_wer[-1], prog_bar=True)
        self.log("val/wer", sum(rates_wer) / len(rates_wer))

    def coarsest(self) -> Rates:
        """The scale of the first task with the fewest tokens."""
        first = self.model.config.scales[0]
        alike = [r for r in self.model.config.scales if bool(r.audio) == bool(first.audio)]
        return max((r for r in alike if bool(r.video) == bool(first.video)), key=lambda r: (r.audio, r.video))


def visual_encoder(source: str, include: bool, lora: int) -> tuple[VideoConfig, dict[str, Tensor]]:
    """The sizes and weights of an AV-HuBERT in our layout; heads are 64 wide, as in all published ones.

    Args:
        source: folder or Hub id of `avhubert.safetensors`.
        include: keep the weights in the model's own file.
        lora: bottleneck of adapters, 0 for none.
    """
    weights = load_file(fetch(source, (AVHUBERT_FILE,)) / AVHUBERT_FILE)
    width = len(weights["layer_norm.weight"]) // 2
    trunk = "feature_extractor_video.resnet.trunk.layer{}.0.conv1.weight"
    sizes = VideoConfig(
        width=width,
        layers=1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layers.")),
        heads=max(1, width // 64),
        ffn=len(weights["encoder.layers.0.fc1.bias"]),
        channels=tuple(len(weights[trunk.format(i)]) for i in (1, 2, 3, 4)),  # type: ignore[arg-type]
        lora=lora,
    )
    return replace(sizes, source=None if include else source), weights


def carried_over(model: LlamaMTSK, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict for a model: given tensors where they fit, the model's own elsewhere.

    A projector that was not given comes from the given one of the nearest place in the list of rates, so a model of one
    pair of rates starts one of many. One adapter for all scales (MS) starts that of every scale (SS), or the shared one
    (MSS), so that the model begins with the outputs of the given one; adapters of any other strategy or number of
    scales start as they are.

    Args:
        model: to be filled.
        given: state dict of another Llama-MTSK model of the same parts.
    """
    out = {}
    for name, own in model.state_dict().items():
        found = _adapter(name, model.lora, given) if name.startswith("lora.") else given.get(name)
        if found is None and "_proj." in name and name.startswith(("audio_proj", "video_proj")):
            head, place, rest = name.split(".", 2)
            known = {int(key.split(".")[1]) for key in given if key.startswith(f"{head}.")}
            found = given.get(f"{head}.{min(known, key=lambda k: abs(k - int(place)))}.{rest}") if known else None
        out[name] = found.to(own) if found is not None and found.shape == own.shape else own
    return out


def _adapter(name: str, lora: Lora, given: Mapping[str, Tensor]) -> Tensor | None:
    """The given matrix with which a matrix of an adapter starts, if any does."""
    head, place, matrix, weight = name.rsplit(".", 3)
    count = 0
    while f"{head}.{count}.{matrix}.{weight}" in given:
        count += 1
    if count == 1:
        heir = {"MS": "0", "SS": place, "MSS": str(lora.scales)}[lora.strategy]
        return given[f"{head}.0.{matrix}.{weight}"] if place == heir else None
    return given[name] if count == {"MS": 1, "SS": lora.scales, "MSS": lora.scales + 1}[lora.strategy] else None


def _weights_of(source: str) -> dict[str, Tensor]:
    if source.endswith(".ckpt"):
        state = torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
        return {name.removeprefix("model."): value for name, value in state.items()}
    return load_file(Path(fetch(source, ("model.safetensors",))) / "model.safetensors")


def _token(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the language model's tokenizer has no token {token!r}; name its bos and eos")
    return int(number)


def _name(rates: Rates) -> str:
    return f"a{rates.audio}_v{rates.video}"
