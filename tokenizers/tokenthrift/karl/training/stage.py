"""What both training stages share: the two passes over a batch, dead codes, validation.

Source: KARL (arXiv 2507.07995), section 3 and appendix. Each step makes two passes over a batch. *Estimating*: every
image gets a random number of tokens, and the error it reaches is measured. *Tokenizing*: every image gets all tokens
and is asked for that error; the halting head has to name the tokens that the first pass did without, and the decoder
sees those that it lets through.

What differs: every image has its own count, where the published code draws one for the batch; dropped tokens are not
computed; counts stop at the model's maximum; the curriculum is saved; tokens may stay continuous for the first steps,
and dead codes are restarted. The average of the weights is Lightning's `EMAWeightAveraging`, which goes on through
epochs and checkpoints.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenthrift.config import from_plain
from tokenthrift.karl.config import ERROR_BINS, KarlConfig
from tokenthrift.karl.halting import kept
from tokenthrift.karl.model import EncodedLatents, Karl
from tokenthrift.karl.quantizer import Quantized
from tokenthrift.karl.training.curriculum import ErrorCurriculum, draw_counts, other_errors
from tokenthrift.karl.training.data import source_name
from tokenthrift.karl.training.image_log import draw, sheet
from tokenthrift.karl.training.losses import (
    halting_loss,
    pixel_error,
)
from tokenthrift.training.schedule import warmup_cosine

__all__ = ["NOISE", "KarlModule", "Pass", "fast_attention", "trained_weights"]

NOISE = 0.1  # of each number of a continuous token of length 1
SHARPNESS = 1.5  # of attention at first, for queries and for keys
SHOWN = 12  # images in a picture of reconstructions


class Pass(NamedTuple):
    """One pass over a batch."""

    distilled: EncodedLatents
    keep: Tensor
    """`(B, T)` bool, the tokens that were decoded."""
    quantized: Quantized
    output: Tensor
    """`(B, h * w, base.outputs)`."""


def trained_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a training checkpoint, or of a model folder as a checkpoint would name them."""
    path = Path(source)
    if path.is_dir():
        from safetensors.torch import load_file

        return {f"model.{name}": tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return state


def fast_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, attention by plain products: for short sequences its backward pass is four times as fast."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def begin(model: Karl) -> None:
    """Weights to start from with which narrow models and short runs get somewhere.

    The published 0.02 suits a width of 1024 and 200 epochs: at first every token is its position and little else, and
    attends to all cells alike. Here tokens start as what they are to become, different views of the image.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if name.endswith("attention.qkv") and isinstance(module, nn.Linear):
            module.weight[: 2 * module.in_features] *= SHARPNESS
    # Beside features of unit variance and the wanted error the published tables are too faint to tell one cell, or one
    # token, from another.
    for table in (model.encoder.positions, model.encoder.queries, model.decoder.positions, model.decoder.places):
        nn.init.normal_(table)


class KarlModule(L.LightningModule):
    """What both stages share: the two passes, dead codes, validation.

    Args:
        model: fields of a `KarlConfig`.
        base_from: checkpoint of a `KarlBaseModule`, or model folder, whose base tokenizer is taken.
        start_from: checkpoint of a stage, or model folder, to begin with; the schedule starts anew.
        learning_rate: peak of the schedule.
        warmup_steps: of linear warm-up, before the cosine.
        weight_decay: of everything but vectors.
        count_step: counts are multiples of it; also the fewest tokens that training uses.
        relabel_prob: share of the images at an extreme count that are asked for another error with the same answer.
        halting_weight: of the halting loss.
        quantizer_weight: of the codebook and commitment loss.
        restart_every: steps between restarts of dead codes; 0 never restarts any.
        restart_below: a code is dead where its use is below this share of the average code's.
        restart_until_step: step after which no code is restarted, so that the average of the weights can settle.
        quantize_start_step: steps before which tokens stay continuous, with a little noise; then the codebook is laid onto
            tokens. A short run learns sooner what tokens are for.
        val_target_error: error asked for in validation.
    """

    offered: Tensor

    def __init__(
        self,
        model: dict[str, Any],
        base_from: str | None = None,
        start_from: str | None = None,
        learning_rate: float = 2e-4,
        warmup_steps: int = 1000,
        weight_decay: float = 0.05,
        count_step: int = 16,
        relabel_prob: float = 0.45,
        halting_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        restart_every: int = 100,
        restart_below: float = 0.03,
        restart_until_step: int | None = None,
        quantize_start_step: int = 0,
        val_target_error: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Karl(from_plain(KarlConfig, model, "model"))
        self.curriculum = ErrorCurriculum()
        self.register_buffer("offered", torch.randn(self.model.config.codebook_size or 0, self.model.config.token_dim))
        begin(self.model)
        if base_from is not None:
            found = {n.removeprefix("model."): t for n, t in trained_weights(base_from).items()}
            self.model.base.load_state_dict(
                {n.removeprefix("base."): t for n, t in found.items() if n.startswith("base.")}
            )
        if start_from is not None:
            found = {n: t for n, t in trained_weights(start_from).items() if n.startswith("model.")}
            self.model.load_state_dict({n.removeprefix("model."): t for n, t in found.items()})

    def first_pass(self, images: Tensor, features: Tensor, counts: Tensor) -> Pass:
        """Random counts, and errors out of reach.

        Args:
            images: `(B, 3, H, W)`.
            features: of the base tokenizer, `(B, C, h, w)`.
            counts: `(B,)`.
        """
        errors = self.curriculum.sample(len(images))
        found = self.model.encode_latents(images, features, counts, errors)
        return self._finish(found, found.mask, features)

    def second_pass(self, images: Tensor, features: Tensor, errors: Tensor) -> Pass:
        """All tokens, a wanted error `(B,)`, and of the tokens those that the halting head keeps."""
        config = self.model.config
        counts = torch.full((len(images),), config.max_tokens, device=images.device)
        found = self.model.encode_latents(images, features, counts, errors)
        keep = kept(
            found.halting_logits.detach(),
            found.mask,
            threshold=config.halting_threshold,
            prefix=config.halting == "prefix",
        )
        return self._finish(found, keep, features)

    def _finish(self, found: EncodedLatents, keep: Tensor, features: Tensor) -> Pass:
        if self.model.quantizer is not None and self.global_step < self.hparams["quantize_start_step"]:
            unit = F.normalize(found.tokens.float(), dim=-1)
            noisy = F.normalize(unit + NOISE * torch.randn_like(unit), dim=-1) if self.training else unit
            quantized = Quantized(torch.where(keep[..., None], noisy, 0), None, unit.new_zeros(()))
        else:
            quantized = self.model.quantize(found.tokens, keep)
        grid = (features.shape[2], features.shape[3])
        return Pass(found, keep, quantized, self.model.decode_latents(quantized.values, keep, grid))

    def answers(self, counts: Tensor, reached: Tensor) -> Tensor:
        """The errors `(B,)` to ask for in the second pass, and one step of the curriculum."""
        h: Any = self.hparams
        self.curriculum.update(reached)
        return other_errors(reached, counts, h.count_step, self.model.config.max_tokens, h.relabel_prob)

    def common_loss(self, one: Pass, counts: Tensor | None) -> Tensor:
        """Halting and quantization of a pass, whose tokens are all needed, or the first `counts`."""
        h: Any = self.hparams
        if counts is None:
            counts = one.distilled.mask.sum(1)
        halting = halting_loss(one.distilled.halting_logits, one.distilled.mask, counts)
        loss: Tensor = h.halting_weight * halting + h.quantizer_weight * one.quantized.loss
        return loss

    def counts(self, images: Tensor) -> Tensor:
        """A random number of tokens for each image."""
        return draw_counts(len(images), self.model.config.max_tokens, self.hparams["count_step"], images.device)

    def log_passes(self, first: Pass, second: Pass, counts: Tensor, reached: Tensor) -> None:
        """The use of the codebook, and how well the head names the counts."""
        used = second.keep.sum(1).float()
        self.log("train/reached", reached.mean(), prog_bar=True)
        self.log("train/count_error", (used - counts).abs().mean() / self.model.config.max_tokens, prog_bar=True)
        if first.quantized.codes is not None:
            codes = torch.cat([p.quantized.codes[p.keep] for p in (first, second) if p.quantized.codes is not None])
            share = torch.bincount(codes) / len(codes)
            self.log("train/perplexity", torch.special.entr(share).sum().exp())

    def offer(self, tokens: Tensor) -> None:
        """Remembers the latest tokens `(N, token_dim)` as places for codes, which must not move before `backward`."""
        self.offered = torch.cat([tokens.detach().float(), self.offered])[: len(self.offered)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lays the codebook onto tokens when it is first used, and moves dead codes onto tokens every so many steps."""
        h: Any = self.hparams
        quantizer, step = self.model.quantizer, self.global_step
        if quantizer is None:
            return
        tokens, mask = self.offered[None], torch.ones(1, len(self.offered), dtype=torch.bool, device=self.device)
        if h.quantize_start_step and step == h.quantize_start_step:
            self._restart(tokens, mask, float("inf"))
        elif step > h.quantize_start_step and h.restart_every and step % h.restart_every == 0:
            self.log("train/codes_in_use", (quantizer.usage > h.restart_below).float().mean())
            if h.restart_until_step is None or step <= h.restart_until_step:
                self.log("train/codes_restarted", float(self._restart(tokens, mask, h.restart_below)))

    def _restart(self, tokens: Tensor, mask: Tensor, threshold: float) -> int:
        quantizer = self.model.quantizer
        assert quantizer is not None
        moved = quantizer.restart(tokens, mask, threshold)
        if distributed.is_available() and distributed.is_initialized():
            # Every process has offered tokens of its own images; the first one's choice is everybody's.
            for tensor in (quantizer.codebook.data, quantizer.usage):
                distributed.broadcast(tensor, 0)
        return moved

    def decoded(self, one: Pass, features: Tensor) -> Tensor:
        """The images of a pass."""
        grid = (features.shape[2], features.shape[3])
        return self.model.base.decode(self.model.to_features(one.output, grid))

    def validation_step(self, images: Tensor, index: int, dataloader_idx: int = 0) -> None:
        """Errors with every count halved and with all, and error, tokens and misses under the wanted error."""
        self._judge(images, index, "val", dataloader_idx)

    def test_step(self, images: Tensor, index: int, dataloader_idx: int = 0) -> None:
        """The same of the test images."""
        self._judge(images, index, "test", dataloader_idx)

    def _judge(self, images: Tensor, index: int, part: str, loader: int) -> None:
        h: Any = self.hparams
        features = self.model.base.encode(images)
        most = self.model.config.max_tokens
        shown, values = [images[:SHOWN]], {}
        for count in (most // 4, most // 2, most):
            counts = torch.full((len(images),), count, device=images.device)
            found = self.model.encode_latents(
                images, features, counts, torch.full_like(counts, ERROR_BINS[0], dtype=torch.float)
            )
            made = self.decoded(self._finish(found, found.mask, features), features).clamp(0, 1)
            values[f"l1_{count}"] = pixel_error(made, images).mean()
            shown.append(made[:SHOWN])
        wanted = torch.full((len(images),), h.val_target_error, device=images.device)
        asked = self.second_pass(images, features, wanted)
        made = self.decoded(asked, features).clamp(0, 1)
        errors = pixel_error(made, images)
        values |= {"l1": errors.mean(), "tokens": asked.keep.sum(1).float().mean()}
        values["missed"] = (errors > h.val_target_error).float().mean()
        name = source_name(self.trainer, part, loader)
        for key, value in values.items():
            self.log(f"{part}/{key}_{name}", value, add_dataloader_idx=False, prog_bar=key in ("l1", "tokens"))
        if index == 0:
            draw(self.logger, f"{part}/{name}", sheet([*shown, made[:SHOWN]]), self.global_step)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        return {"scheduler": warmup_cosine(optimizer, steps, self.hparams["warmup_steps"]), "interval": "step"}
