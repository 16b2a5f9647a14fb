"""Training of Llama-MTSK under Lightning: projectors, adapters and markers, over frozen encoders and language model.

Source: Llama-MTSK (arXiv 2503.06362), sections 3 and 4.1: every pair of rates in every step with equal weights, AdamW
(0.9, 0.98) with weight decay 0.1, a cosine to zero over all steps without warm-up, gradients clipped at 10. What
differs: scales run forward and backward one by one after one pass of the encoders (`scales`), the loss is not divided
again by the batch size, a step may take a drawn few of the scales instead of all, a language model that is too small to
be prompted may be trained along, and validation reads texts at the finest and the coarsest rates of development data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.evaluation.wer import word_errors
from tokenthrift.mtsk.config import LoraConfig, MTSKConfig, Task, VideoConfig, scales_of
from tokenthrift.mtsk.data import Batch
from tokenthrift.mtsk.lora import Strategy
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.pretrained import assemble, video_sizes
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.scales import backward_by_scale
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.sources import fetch

__all__ = ["MtskModule", "Origin", "carried_over", "visual_encoder"]

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
        video_lora: bottleneck of adapters in the visual encoder, 0 for none; needs clips, not cached states.
        include_frozen: keep encoders and language model in the model's own files instead of naming where they lie.
        train_language_model: train the language model too, for one too small to be prompted; needs include_frozen.
        scales_per_step: scales drawn for each step; all of them if not given, as published.
        learning_rate: at the first step.
        weight_decay: of matrices.
        gradient_clip: largest norm of the gradient.
        warmup_steps: steps of linear warm-up.
        start_from: model folder or training checkpoint to begin with, see `carried_over`. The schedule starts anew. One
            that is not there is an error when training begins, unless it goes on from a checkpoint.
        seed: of the draw of scales.

    Raises:
        ValueError: a token that the tokenizer lacks, or a trained language model that would not be kept.
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
        if train_language_model and not include_frozen:
            raise ValueError("train_language_model changes the language model, so include_frozen must keep it")
        self.save_hyperparameters()
        self.automatic_optimization = False  # a step has a backward pass per scale
        tokenizer = Tokenizer.from_file(str(fetch(language_model, ("tokenizer.json",)) / "tokenizer.json"))
        audio_places, video_places = _rates(audio_rates, video_rates)
        video, weights = (None, None) if avhubert is None else visual_encoder(avhubert, include_frozen, video_lora)
        self.model = assemble(
            language_model,
            whisper=whisper,
            video=video,
            bos_id=_token(tokenizer, bos) if bos else None,
            eos_id=_token(tokenizer, eos),
            include_frozen=include_frozen,
            tasks=_tasks(tasks),
            audio_rates=audio_places,
            video_rates=video_places,
            compression=compression,
            projector_width=projector_width,
            lora=LoraConfig(strategy=strategy, bottleneck=bottleneck, scale=lora_scale),
        )
        if weights is not None and self.model.video_encoder is not None:
            self.model.video_encoder.load_state_dict(weights)
        if train_language_model:
            self.model.language_model.requires_grad_(True)
        self.missing_start: OSError | None = None
        if start_from is not None:
            try:
                given, origin = _start(start_from)
            except OSError as error:
                self.missing_start = error
            else:
                self.model.load_state_dict(carried_over(self.model, given, origin))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Misses no start any more: a checkpoint brings all weights."""
        self.missing_start = None

    def on_fit_start(self) -> None:
        """Raises what stood in the way of `start_from`."""
        if self.missing_start is not None:
            raise self.missing_start

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
        """The states of a batch, as they come or from the encoders.

        Raises:
            ValueError: states that have passed a visual encoder whose adapters are to be trained.
        """
        if batch.audio_lengths is None and batch.video_lengths is None:
            audio, video = (v if isinstance(v, list) else None for v in (batch.audio, batch.video))
            # A stream that the model does not take is left alone.
            audio = audio if self.model.audio_encoder is not None else None
            video = video if self.model.video_encoder is not None else None
            return self.model.encode(audio, video)
        if batch.video_lengths is not None and self.model.video_lora is not None:
            raise ValueError(
                f"video_lora {self.hparams['video_lora']} adapts the visual encoder, but these data are states that"
                " have passed it already, so it would learn nothing; train on a manifest, or set video_lora to 0"
            )
        states = {n: getattr(batch, n) for n in ("audio", "audio_lengths", "video", "video_lengths")}
        return Encoded(**{name: value for name, value in states.items() if value is not None})

    def fitting(self, encoded: Encoded) -> list[Rates]:
        """The scales for which a batch has the streams.

        Raises:
            ValueError: there are none.
        """
        audio, video = encoded.audio is not None, encoded.video is not None
        found = [r for r in self.model.config.scales if (audio or not r.audio) and (video or not r.video)]
        if not found:
            streams = " and ".join(name for name, there in (("audio", audio), ("video", video)) if there)
            tasks = ", ".join(self.model.config.tasks)
            raise ValueError(f"all items of a batch have {streams}, and nothing else, which is too little for {tasks}")
        return found

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """One step on all scales that the batch has the streams for, or on a drawn few; returns their mean loss."""
        h: Any = self.hparams
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        ids = [self.model.token_ids(text) for text in batch.texts]
        encoded = self.encoded(batch)
        scales = self.fitting(encoded)
        if h.scales_per_step is not None:
            draw = random.Random(f"{h.seed}-{self.global_step}")
            scales = draw.sample(scales, min(h.scales_per_step, len(scales)))
        optimizer.zero_grad()
        losses = backward_by_scale(
            lambda states, rates: self.model.loss(states, ids, rates),
            encoded,
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
        self.on_fit_start()
        self.read: dict[Rates, list[tuple[str, str]]] = {}

    def validation_step(self, batch: Batch | None, index: int) -> None:
        """The loss at every scale for which the batch has the streams; texts at the finest and the coarsest."""
        if batch is None:  # nothing of it could be read; in training Lightning itself goes on to the next
            return
        encoded = self.encoded(batch)
        ids = [self.model.token_ids(text) for text in batch.texts]
        scales = self.fitting(encoded)
        for rates in scales:
            self.log(f"val/loss_{_name(rates)}", self.model.loss(encoded, ids, rates), batch_size=len(ids))
        read = list(dict.fromkeys([scales[0], coarsest(scales)]))
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
        if rates_wer:
            self.log("val/wer", sum(rates_wer) / len(rates_wer))


def coarsest(scales: Sequence[Rates]) -> Rates:
    """The scale with the fewest tokens of those that take the streams of the first."""
    first = scales[0]
    alike = [r for r in scales if (bool(r.audio), bool(r.video)) == (bool(first.audio), bool(first.video))]
    return max(alike, key=lambda r: (r.audio, r.video))


def visual_encoder(source: str, include: bool, lora: int) -> tuple[VideoConfig, dict[str, Tensor]]:
    """The sizes and weights of an AV-HuBERT in our layout.

    Args:
        source: folder or Hub id of `avhubert.safetensors`.
        include: keep the weights in the model's own file.
        lora: bottleneck of adapters, 0 for none.
    """
    weights = load_file(fetch(source, (AVHUBERT_FILE,)) / AVHUBERT_FILE)
    return replace(video_sizes(weights), lora=lora, source=None if include else source), weights


@dataclass(frozen=True)
class Origin:
    """What the weights of another model were trained for.

    Attributes:
        tasks: of the model.
        audio_rates: of its projectors, in order.
        video_rates: of its projectors, in order.
        strategy: of its adapters.
    """

    tasks: tuple[Task, ...]
    audio_rates: tuple[int, ...]
    video_rates: tuple[int, ...]
    strategy: Strategy

    @classmethod
    def of(cls, config: MTSKConfig) -> Origin:
        """That of a model with this configuration."""
        return cls(config.tasks, config.audio_rates, config.video_rates, config.lora.strategy)


def carried_over(model: LlamaMTSK, given: Mapping[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    """A whole state dict for a model: given tensors where they fit, the model's own elsewhere.

    A projector comes from the given one of the nearest rate, so a model of one pair of rates starts one of many. One
    adapter for all scales (MS) starts that of every scale (SS), or the shared one (MSS), so that the model begins with
    the outputs of the given one; with the same strategy an adapter comes from that of the same pair of rates. All other
    adapters start as they are.

    Args:
        model: to be filled.
        given: state dict of another Llama-MTSK model of the same parts.
        origin: of the given one.
    """
    out = {}
    for name, own in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "lora":
            source = _adapter(name, model.config, origin)
        elif part in ("audio_proj", "video_proj"):
            source = _projector(part, rest, model.config, origin)
        else:
            source = name
        found = None if source is None else given.get(source)
        out[name] = found.to(own) if found is not None and found.shape == own.shape else own
    return out


def _projector(part: str, rest: str, config: MTSKConfig, origin: Origin) -> str | None:
    """The name of the given projector's matrix with which one of the model's starts, if any does."""
    place, _, layer = rest.partition(".")
    name = part.replace("proj", "rates")
    known: tuple[int, ...] = getattr(origin, name)
    rate = getattr(config, name)[int(place)]
    return f"{part}.{known.index(min(known, key=lambda r: abs(r - rate)))}.{layer}" if known else None


def _adapter(name: str, config: MTSKConfig, origin: Origin) -> str | None:
    """The name of the given adapter's matrix with which one of the model's starts, if any does."""
    head, place, matrix, weight = name.rsplit(".", 3)
    scales, k = config.scales, int(place)
    known = scales_of(origin.tasks, origin.audio_rates, origin.video_rates)
    source = None
    if origin.strategy == "MS":
        heir = {"MS": 0, "SS": k, "MSS": len(scales)}[config.lora.strategy]
        source = 0 if k == heir else None
    elif origin.strategy == config.lora.strategy:
        shared = k == len(scales)
        source = len(known) if shared else known.index(scales[k]) if scales[k] in known else None
    return None if source is None else f"{head}.{source}.{matrix}.{weight}"


def _start(source: str) -> tuple[dict[str, Tensor], Origin]:
    """The weights of a model folder or training checkpoint, and what they were trained for."""
    if source.endswith(".ckpt"):
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        h = checkpoint["hyper_parameters"]
        audio, video = _rates(h["audio_rates"], h["video_rates"])
        return weights, Origin(_tasks(h["tasks"]), audio, video, h["strategy"])
    folder = Path(fetch(source, ("model.safetensors", "config.json")))
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rates = tuple(plain["audio_rates"]), tuple(plain["video_rates"])
    origin = Origin(tuple(plain["tasks"]), *rates, plain["lora"]["strategy"])
    return load_file(folder / "model.safetensors"), origin


def _tasks(given: list[Task] | None) -> tuple[Task, ...]:
    return tuple(given or ["avsr"])


def _rates(audio: list[int] | None, video: list[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(audio or [4, 16]), tuple(video or [2, 5])


def _token(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the language model's tokenizer has no token {token!r}; name its bos and eos")
    return int(number)


def _name(rates: Rates) -> str:
    return f"a{rates.audio}_v{rates.video}"
