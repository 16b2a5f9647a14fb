"""Training of Llama-MTSK under Lightning: projectors, adapters and markers, over frozen encoders and language model.

Source: Llama-MTSK (arXiv 2503.06362), sections 3 and 4.1: every pair of rates in every step with equal weights, AdamW
(0.9, 0.98) with weight decay 0.1, a cosine to zero over all steps without warm-up, gradients clipped at 10. What
differs: scales run forward and backward one by one after one pass of the encoders (`scales`), the loss is not divided
again by the batch size and is the same on any number of processes (`processes`), a step may take a random few of the
scales instead of all, a language model that is too small to be prompted may be trained along, and validation reads
texts at the finest and the coarsest rates of development data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tokenthrift.config import ConfigError, from_plain, to_plain
from tokenthrift.evaluation.wer import word_errors
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.assembly import AssemblyConfig, assemble
from tokenthrift.mtsk.training.clips import Batch
from tokenthrift.mtsk.training.processes import average_gradients, common_streams, local_gradients, total
from tokenthrift.mtsk.training.scales import backward_by_scale
from tokenthrift.mtsk.training.start import carried_over, read_origin
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import gathered
from tokenthrift.training.text_log import log_texts

__all__ = ["MtskModule", "coarsest", "module_options"]


class MtskModule(L.LightningModule):
    """Trains one model for many rates, or for one.

    Args:
        config: the parts of the model and what is trained between them.
        optim: AdamW and its schedule.
        train_language_model: train the language model too, for one too small to be prompted; needs include_frozen.
        scales_per_step: scales chosen at random for each step; all of them if not given, as published.
        gradient_clip: largest norm of the gradient.
        accumulate: batches of which one step takes the mean gradient.
        start_from: model folder or training checkpoint to begin with, see `carried_over`. The schedule starts anew. One
            that does not exist is an error when training begins, unless it goes on from a checkpoint.
        seed: of the random choice of scales.
        frozen: beginnings of the names of further weights that stay as they are.
        fixed_channels: so many last channels of sound and video tokens and of markers get no gradient, where a
            language model has flags in them (`recipes/mtsk/whisper_llama.py`). Weight decay still shrinks those of
            matrices that are not zero.

    Raises:
        ValueError: a token that the tokenizer lacks, a trained language model that would not be kept, a step of no
            batch, or a name in `frozen` that no weight has.
    """

    def __init__(
        self,
        config: AssemblyConfig,
        optim: OptimConfig = OptimConfig(weight_decay=0.1),  # noqa: B008  (frozen)
        train_language_model: bool = False,
        scales_per_step: int | None = None,
        gradient_clip: float = 10.0,
        accumulate: int = 1,
        start_from: str | None = None,
        seed: int = 0,
        frozen: tuple[str, ...] = (),
        fixed_channels: int = 0,
    ) -> None:
        super().__init__()
        if train_language_model and not config.include_frozen:
            raise ValueError("train_language_model changes the language model, so include_frozen must keep it")
        if accumulate < 1:
            raise ValueError(f"accumulate is how many batches make a step, from 1; got {accumulate}")
        plain = {"config": to_plain(config), "optim": to_plain(optim), "train_language_model": train_language_model}
        more = {"scales_per_step": scales_per_step, "gradient_clip": gradient_clip, "accumulate": accumulate}
        kept = {"frozen": list(frozen), "fixed_channels": fixed_channels}
        self.save_hyperparameters({**plain, **more, **kept, "start_from": start_from, "seed": seed})
        self.optim = optim
        self.automatic_optimization = False  # a step has a backward pass per scale
        self.held = 0  # batches whose gradients wait for a step
        self.model = assemble(config).train()
        if train_language_model:
            self.model.language_model.requires_grad_(True).train()
        freeze(self.model, frozen)
        fix_channels(self.model, fixed_channels)
        self.missing_start: OSError | None = None
        if start_from is not None:
            try:
                weights, origin = read_origin(start_from)
            except OSError as error:
                self.missing_start = error
            else:
                self.model.load_state_dict(carried_over(self.model, weights, origin))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint brings all weights, so a start that does not exist is no error any more."""
        self.missing_start = None

    def setup(self, stage: str) -> None:
        """Raises the error of states that were made with other silence than the model reads."""
        audio = self.model.config.audio
        for silence in getattr(getattr(self.trainer, "datamodule", None), "trailing_silences", ()):
            if audio is not None and silence != audio.trailing_silence:
                raise ConfigError(
                    f"the states were made with trailing_silence {silence}, the model has {audio.trailing_silence}"
                )

    def on_fit_start(self) -> None:
        """Raises the error of a `start_from` that does not exist."""
        if self.missing_start is not None:
            raise self.missing_start

    def configure_optimizers(self) -> Any:
        """AdamW, warm-up and a cosine."""
        groups, steps = parameter_groups(self.model, self.optim), int(self.trainer.estimated_stepping_batches)
        if self.trainer.max_steps < 0:  # then it is the batches of all epochs
            steps = math.ceil(steps / self.hparams["accumulate"])
        return optimizer_and_schedule(groups, self.optim, steps)

    def encoded(self, batch: Batch, *, audio: bool = True, video: bool = True) -> Encoded:
        """The states of a batch, as they come or from the encoders.

        Args:
            batch: with a text or more.
            audio: use the sound, where the batch has it.
            video: use the video, where the batch has it.

        Raises:
            ValueError: states that have passed a visual encoder whose adapters are to be trained.
        """
        model = self.model
        states: dict[str, Any] = {}
        # A stream that the model does not take is left alone.
        if audio and batch.audio is not None and model.config.audio is not None:
            states |= _stream("audio", batch.audio, batch.audio_lengths, model.encode_audio)
        if video and batch.video is not None and model.config.video is not None:
            if batch.video_lengths is not None and model.video_lora is not None:
                raise ValueError(
                    f"video_lora {model.config.video.lora} adapts the visual encoder, but these data are states that"
                    " have passed it already, so it would learn nothing; train on a manifest, or set video_lora to 0"
                )
            states |= _stream("video", batch.video, batch.video_lengths, model.encode_video)
        return Encoded(**states)

    def fitting(self, *, audio: bool, video: bool) -> list[Rates]:
        """The scales for which a batch has the streams.

        Raises:
            ValueError: there are none.
        """
        found = [rates for rates in self.model.config.scales if rates.fits(audio=audio, video=video)]
        if not found:
            streams = " and ".join(name for name, there in (("audio", audio), ("video", video)) if there) or "no stream"
            tasks = ", ".join(self.model.config.tasks)
            raise ValueError(f"all items of a batch have {streams}, and nothing else, which is too little for {tasks}")
        return found

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        """All scales that the batch has the streams for, or a random few; returns their mean loss.

        The batch is the global one: every process does the same scales, and the loss is that of all tokens. A step
        follows where enough batches are accumulated; the batches of a step have the same choice of scales.
        """
        h: Any = self.hparams
        optimizer: Any = self.optimizers()
        ids = [self.model.token_ids(text) for text in batch.texts]
        tokens = torch.tensor(float(sum(len(row) + 1 for row in ids)), dtype=torch.float32, device=self.device)
        # What cannot be read of the batch of one process must not stop the others.
        empty = not ids
        audio, video = common_streams(empty or batch.audio is not None, empty or batch.video is not None, self.device)
        everything = total(tokens)
        if not everything:
            return None
        scales = self.fitting(audio=audio, video=video)
        if h.scales_per_step is not None:
            rng = random.Random(f"{h.seed}-{self.global_step}")
            scales = rng.sample(scales, min(h.scales_per_step, len(scales)))
        if not self.held:
            optimizer.zero_grad()
        share = float(tokens / everything)
        means = torch.zeros(len(scales), dtype=torch.float32, device=self.device)
        if not empty:
            with local_gradients(self.trainer.strategy.model):
                losses = backward_by_scale(
                    lambda states, rates: self.model.loss(states, ids, rates),
                    self.encoded(batch, audio=audio, video=video),
                    scales,
                    [share * self.trainer.world_size / (len(scales) * h.accumulate)] * len(scales),
                    backward=self.manual_backward,
                )
            means = torch.stack(list(losses.values())).float() * share
        self.held = (self.held + 1) % h.accumulate
        if not self.held:
            self._step(optimizer)
        loss = total(means).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _step(self, optimizer: Any) -> None:
        """One step with the gradients that are there, those of all processes."""
        h: Any = self.hparams
        schedule: Any = self.lr_schedulers()
        average_gradients(self.trainer.strategy.model, self.model.parameters())
        weights = [p for p in self.model.parameters() if p.grad is not None]
        self.log("train/norm", torch.nn.utils.clip_grad_norm_(weights, h.gradient_clip))
        optimizer.step()
        schedule.step()

    def on_validation_epoch_start(self) -> None:
        """Clears the losses and texts of the last validation."""
        self.on_fit_start()
        self.losses: dict[Rates, list[float]] = {}
        self.texts: dict[Rates, list[tuple[str, str]]] = {}

    def validation_step(self, batch: Batch, index: int) -> None:
        """The loss at every scale for which the batch has the streams; texts at the finest and the coarsest."""
        if not batch.texts:  # nothing of it could be read
            return
        encoded = self.encoded(batch)
        ids = [self.model.token_ids(text) for text in batch.texts]
        scales = self.fitting(audio=encoded.audio is not None, video=encoded.video is not None)
        count = sum(len(row) + 1 for row in ids)
        for rates in scales:
            sums = self.losses.setdefault(rates, [0.0, 0.0])
            sums[0] += count * self.model.loss(encoded, ids, rates).item()
            sums[1] += count
        ends = list(dict.fromkeys([scales[0], coarsest(scales)]))
        # A few tokens more than the truth has, so that a model that never stops costs little.
        for rates, rows in self.model.generate_all(encoded, ends, [len(row) + 8 for row in ids], beams=1).items():
            texts = [self.model.text_of(row.ids) for row in rows]
            self.texts.setdefault(rates, []).extend(zip(batch.texts, texts, strict=True))

    def on_validation_epoch_end(self) -> None:
        """Losses, word error rates at the finest and the coarsest scale, and their mean, over all processes; texts."""
        found = gathered([(self.losses, self.texts)])
        for rates in dict.fromkeys(rates for losses, _ in found for rates in losses):
            sums = [losses[rates] for losses, _ in found if rates in losses]
            self.log(f"val/loss_{_name(rates)}", sum(s for s, _ in sums) / sum(n for _, n in sums), sync_dist=True)
        error_rates = []
        for rates in dict.fromkeys(rates for _, texts in found for rates in texts):
            truth, generated = zip(*[pair for _, texts in found for pair in texts.get(rates, [])], strict=True)
            error_rates.append(word_errors(truth, generated, str).rate)
            self.log(f"val/wer_{_name(rates)}", error_rates[-1], prog_bar=True, sync_dist=True)
        if error_rates:
            self.log("val/wer", sum(error_rates) / len(error_rates), sync_dist=True)
        log_texts(self, "val/texts", sample_lines(self.texts))


def sample_lines(texts: Mapping[Rates, Sequence[tuple[str, str]]], most: int = 8) -> list[str]:
    """Some of what was said and of what was read, by pair of rates."""
    shown = ((rates, pair) for rates, own in texts.items() for pair in own[:most])
    return [f"{rates}: '{said}' read as '{read}'" for rates, (said, read) in shown]


def module_options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `MtskModule` from the hyper-parameters of a checkpoint, which are flat in release 0.1.0."""
    options = {name: value for name, value in saved.items() if not name.startswith("_")}
    if "config" not in options:
        names = {"projector_width": "projector_hidden_size"}
        options = {names.get(name, name): value for name, value in options.items()}
        for name, kind in (("config", AssemblyConfig), ("optim", OptimConfig)):
            own = {field.name for field in fields(kind)}
            given = {key: options.pop(key) for key in own & options.keys()}
            # A list of tasks or rates that was not given was null.
            options[name] = {key: value for key, value in given.items() if value is not None or key == "whisper"}
    config = from_plain(AssemblyConfig, options["config"], "config")
    return {**options, "config": config, "optim": from_plain(OptimConfig, options["optim"], "optim")}


def coarsest(scales: Sequence[Rates]) -> Rates:
    """The scale with the fewest tokens of those that take the streams of the first."""
    first = scales[0]
    alike = [r for r in scales if (bool(r.audio), bool(r.video)) == (bool(first.audio), bool(first.video))]
    return max(alike, key=lambda r: (r.audio, r.video))


def _stream(name: str, rows: Any, lengths: Tensor | None, encode: Any) -> dict[str, Tensor]:
    """States and lengths of one stream, by the names of `Encoded`."""
    states, lengths = (rows, lengths) if lengths is not None else encode(rows)
    return {name: states, f"{name}_lengths": lengths}


def _name(rates: Rates) -> str:
    return f"a{rates.audio}_v{rates.video}"


def freeze(model: LlamaMtsk, beginnings: Sequence[str]) -> None:
    """Leaves the weights whose names begin so out of training.

    Raises:
        ValueError: no weight does.
    """
    for beginning in beginnings:
        found = [weight for name, weight in model.named_parameters() if name.startswith(beginning)]
        if not found:
            raise ValueError(f"no weight of the model has a name that begins with {beginning!r}")
        for weight in found:
            weight.requires_grad_(False)


def fix_channels(model: LlamaMtsk, count: int) -> None:
    """Gradients of zero for the last channels of what projectors give, and of markers.

    Raises:
        ValueError: a projector ends in a norm, which mixes channels.
    """
    if not count:
        return
    if model.config.projector_norm:
        raise ValueError("fixed_channels needs projectors without a norm: projector_norm false")
    parts = [getattr(model, name) for name in ("audio_proj", "video_proj") if hasattr(model, name)]
    ends = [project[-1] for part in parts for project in part]
    rows = [weight for end in ends for weight in (end.weight, end.bias)]

    def keep(gradient: Tensor, dim: int) -> Tensor:
        fixed = gradient.clone()
        fixed.narrow(dim, gradient.shape[dim] - count, count).zero_()
        return fixed

    for row in rows:
        if row.requires_grad:
            row.register_hook(lambda gradient: keep(gradient, 0))
    if model.markers is not None and model.markers.requires_grad:
        model.markers.register_hook(lambda gradient: keep(gradient, 1))
