"""What both training stages share: the two passes over a batch, dead codes, validation.

Source: KARL (arXiv 2507.07995), section 3 and appendix. Each step makes two passes over a batch. *Estimating*: every
image gets a random number of tokens, and the error that it achieves is measured. *Tokenizing*: every image gets all
tokens, and that error is its target; the halting head has to name the tokens that the first pass did without, and the
decoder sees those that it lets through.

What differs: every image has its own count, where the published code draws one for the batch; dropped tokens are not
computed; counts stop at the model's maximum; the curriculum is saved; tokens may stay continuous for the first steps,
and dead codes are restarted; several processes compute what one would with the same images. The average of the weights
is Lightning's `EMAWeightAveraging`, which goes on through epochs and checkpoints.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenthrift.config import to_plain
from tokenthrift.karl.config import ERROR_BINS, KarlConfig
from tokenthrift.karl.halting import kept
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.model import EncodedLatents, Karl
from tokenthrift.karl.quantizer import Quantized
from tokenthrift.karl.training.curriculum import ErrorCurriculum, relabeled
from tokenthrift.karl.training.data import ImageBatch, source_name
from tokenthrift.karl.training.draws import ImageDraws
from tokenthrift.karl.training.image_log import log_images
from tokenthrift.karl.training.losses import halting_loss
from tokenthrift.training.optim import OptimConfig
from tokenthrift.training.processes import balanced, rank_and_world
from tokenthrift.training.start_weights import StartWeights, load_start_weights, read_start_weights

__all__ = ["NOISE", "OPTIM", "KarlModule", "Pass", "fast_attention", "init_weights", "weights_below"]

OPTIM = OptimConfig(learning_rate=2e-4, weight_decay=0.05, betas=(0.9, 0.95), warmup_steps=1000, min_lr=1e-6)
"""The paper's, for a batch of 512."""
NOISE = 0.1  # of each number of a continuous token of length 1
SHARPNESS = 1.5  # of attention at first, for queries and for keys
SHOWN = 12  # images in a row of the logged ones


class Pass(NamedTuple):
    """One pass over a batch."""

    encoded: EncodedLatents
    keep: Tensor
    """`(B, T)` bool, the tokens that were decoded."""
    quantized: Quantized
    output: Tensor
    """`(B, h * w, base.outputs)`."""


def weights_below(source: str, *prefixes: str) -> StartWeights:
    """Weights of a training checkpoint or a model whose names have the first of some prefixes that any has, without it.

    Raises:
        ValueError: no name has one.
    """
    found = read_start_weights(source)
    for prefix in prefixes:
        tensors = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
        if tensors:
            return StartWeights(tensors, found.options, found.config)
    raise ValueError(f"{source}: no weights of {' or '.join(prefixes)}")


def fast_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU, attention by plain products: for short sequences its backward pass is four times as fast."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@torch.no_grad()
def init_weights(model: Karl) -> None:
    """Weights to start from with which narrow models and short runs get somewhere.

    The published 0.02 suits a hidden size of 1024 and 200 epochs: at first every token is its position and little else,
    and attends to all cells alike. Here tokens start as what they are to become, different views of the image.
    """
    for name, module in model.named_modules():
        if name.startswith("base"):
            continue
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if name.endswith("attention.qkv") and isinstance(module, nn.Linear):
            module.weight[: 2 * module.in_features] *= SHARPNESS
    # Beside features of unit variance and the target error the published tables are too faint to tell one cell, or one
    # token, from another.
    for table in (model.encoder.positions, model.encoder.queries, model.decoder.positions, model.decoder.places):
        nn.init.normal_(table)


class KarlModule(L.LightningModule):
    """What both stages share: the two passes, dead codes, validation.

    Args:
        config: of the model.
        optim: how it is trained.
        base_from: checkpoint of a `KarlBaseModule` or of a stage, or model folder, whose base tokenizer is taken.
        start_from: checkpoint of a stage, or model folder, to begin with; the schedule starts anew.
        count_step: counts are multiples of it; also the fewest tokens that training uses.
        relabel_prob: that an image at an extreme count is given another target error with the same answer.
        halting_weight: of the halting loss.
        quantizer_weight: of the codebook and commitment loss.
        restart_every: steps between restarts of dead codes; 0 never restarts any.
        restart_below: a code is dead where its use is below this share of the average code's.
        restart_until_step: step after which no code is restarted, so that the average of the weights can settle.
        quantize_start_step: steps before which tokens stay continuous, with a little noise; then the codebook is laid
            onto tokens. A short run learns sooner what tokens are for.
        val_target_error: target error of validation.
    """

    token_buffer: Tensor

    def __init__(
        self,
        config: KarlConfig,
        optim: OptimConfig = OPTIM,
        base_from: str | None = None,
        start_from: str | None = None,
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
        self.save_hyperparameters(ignore=["config", "optim"])
        self.save_hyperparameters({"config": to_plain(config), "optim": to_plain(optim)})
        self.optim = optim
        self.model = Karl(config).train()
        self.curriculum = ErrorCurriculum()
        self.register_buffer("token_buffer", torch.randn(config.codebook_size or 0, config.token_dim))
        init_weights(self.model)
        if base_from is not None:
            load_start_weights(self.model.base, weights_below(base_from, "model.base.", "base."), allow_missing=False)
        if start_from is not None:
            load_start_weights(self.model, weights_below(start_from, "model."), allow_missing=False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reads checkpoints of release 0.1.0, where the buffer had another name."""
        state = checkpoint["state_dict"]
        if "offered" in state:
            state["token_buffer"] = state.pop("offered")

    def first_pass(self, images: Tensor, features: Tensor, counts: Tensor, draws: ImageDraws) -> Pass:
        """Random counts, and target errors that cannot be achieved.

        Args:
            images: `(B, 3, H, W)`.
            features: of the base tokenizer, `(B, C, h, w)`.
            counts: `(B,)`.
            draws: of the images.
        """
        found = self.model.encode_latents(images, features, counts, self.curriculum.sample(draws))
        return self._finish(found, found.mask, features, draws)

    def second_pass(self, images: Tensor, features: Tensor, errors: Tensor, draws: ImageDraws | None = None) -> Pass:
        """All tokens, target errors `(B,)`, and of the tokens those that the halting head keeps."""
        config = self.model.config
        counts = torch.full((len(images),), config.max_tokens, device=images.device)
        found = self.model.encode_latents(images, features, counts, errors)
        keep = kept(
            found.halting_logits.detach(),
            found.mask,
            threshold=config.halting_threshold,
            prefix=config.halting == "prefix",
        )
        return self._finish(found, keep, features, draws)

    def _finish(self, found: EncodedLatents, keep: Tensor, features: Tensor, draws: ImageDraws | None) -> Pass:
        """Quantizes and decodes; `draws` adds noise to tokens that are still continuous."""
        if self.model.quantizer is not None and self.global_step < self.hparams["quantize_start_step"]:
            unit = F.normalize(found.tokens.float(), dim=-1)
            noisy = unit if draws is None else F.normalize(unit + NOISE * draws.normal_like(unit), dim=-1)
            quantized = Quantized(torch.where(keep[..., None], noisy, 0), None, unit.new_zeros(()))
        else:
            quantized = self.model.quantize(found.tokens, keep)
        grid = (features.shape[2], features.shape[3])
        return Pass(found, keep, quantized, self.model.decode_latents(quantized.values, keep, grid))

    def second_targets(self, counts: Tensor, achieved: Tensor, draws: ImageDraws) -> Tensor:
        """The target errors `(B,)` of the second pass, and one step of the curriculum."""
        h: Any = self.hparams
        self.curriculum.update(achieved)
        return relabeled(achieved, counts, h.count_step, self.model.config.max_tokens, h.relabel_prob, draws)

    def common_loss(self, one: Pass, counts: Tensor | None) -> Tensor:
        """Halting and quantization of a pass, whose tokens are all needed, or the first `counts`."""
        h: Any = self.hparams
        if counts is None:
            counts = one.encoded.mask.sum(1)
        halting = halting_loss(one.encoded.halting_logits, one.encoded.mask, counts)
        loss = balanced(h.halting_weight * halting, len(counts))
        return loss + balanced(h.quantizer_weight * one.quantized.loss, one.keep.sum())

    def counts(self, draws: ImageDraws) -> Tensor:
        """A random number of tokens for each image."""
        return draws.counts(self.model.config.max_tokens, self.hparams["count_step"])

    def log_passes(self, first: Pass, second: Pass, counts: Tensor, achieved: Tensor) -> None:
        """The use of the codebook, and how well the head names the counts."""
        used = second.keep.sum(1).float()
        self.log("train/achieved_error", achieved.mean(), prog_bar=True)
        self.log("train/count_error", (used - counts).abs().mean() / self.model.config.max_tokens, prog_bar=True)
        if first.quantized.codes is not None:
            codes = torch.cat([p.quantized.codes[p.keep] for p in (first, second) if p.quantized.codes is not None])
            share = torch.bincount(codes) / len(codes)
            self.log("train/perplexity", torch.special.entr(share).sum().exp())

    def remember(self, tokens: Tensor) -> None:
        """Puts the latest tokens `(N, token_dim)` into the buffer; codes move onto them, but not before `backward`."""
        self.token_buffer = torch.cat([tokens.detach().float(), self.token_buffer])[: len(self.token_buffer)]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lays the codebook onto tokens when it is first used, and moves dead codes onto tokens every so many steps."""
        h: Any = self.hparams
        quantizer, step = self.model.quantizer, self.global_step
        if quantizer is None:
            return
        if h.quantize_start_step and step == h.quantize_start_step:
            self._restart(float("inf"))
        elif step > h.quantize_start_step and h.restart_every and step % h.restart_every == 0:
            self.log("train/codes_in_use", (quantizer.usage > h.restart_below).float().mean())
            if h.restart_until_step is None or step <= h.restart_until_step:
                self.log("train/codes_restarted", float(self._restart(h.restart_below)))

    def _restart(self, threshold: float) -> int:
        quantizer = self.model.quantizer
        assert quantizer is not None
        tokens = self.token_buffer[None]
        moved = quantizer.restart(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool), threshold)
        if rank_and_world()[1] > 1:
            # Every process remembers tokens of its own images; the first one's choice is everybody's.
            for tensor in (quantizer.codebook.data, quantizer.usage):
                distributed.broadcast(tensor, 0)
        return moved

    def decoded(self, one: Pass, features: Tensor) -> Tensor:
        """The images of a pass."""
        grid = (features.shape[2], features.shape[3])
        return self.model.base.decode(self.model.to_features(one.output, grid))

    def validation_step(self, batch: ImageBatch, index: int, dataloader_idx: int = 0) -> None:
        """Errors at a quarter, half and all of the tokens; and error, tokens and misses at the target error."""
        self._evaluate(batch.images, index, "val", dataloader_idx)

    def test_step(self, batch: ImageBatch, index: int, dataloader_idx: int = 0) -> None:
        """The same of the test images."""
        self._evaluate(batch.images, index, "test", dataloader_idx)

    def _evaluate(self, images: Tensor, index: int, part: str, loader: int) -> None:
        target: float = self.hparams["val_target_error"]
        features = self.model.base.encode(images)
        most = self.model.config.max_tokens
        shown, values = [images[:SHOWN]], {}
        for count in (most // 4, most // 2, most):
            counts = torch.full((len(images),), count, device=images.device)
            strictest = torch.full_like(counts, ERROR_BINS[0], dtype=torch.float)
            found = self.model.encode_latents(images, features, counts, strictest)
            made = self.decoded(self._finish(found, found.mask, features, None), features).clamp(0, 1)
            values[f"l1_{count}"] = pixel_error(made, images).mean()
            shown.append(made[:SHOWN])
        adaptive = self.second_pass(images, features, torch.full((len(images),), target, device=images.device))
        made = self.decoded(adaptive, features).clamp(0, 1)
        errors = pixel_error(made, images)
        values |= {"l1": errors.mean(), "tokens": adaptive.keep.sum(1).float().mean()}
        values["missed"] = (errors > target).float().mean()
        name = source_name(self.trainer, part, loader)
        for key, value in values.items():
            self.log(
                f"{part}/{key}_{name}",
                value,
                add_dataloader_idx=False,
                prog_bar=key in ("l1", "tokens"),
                sync_dist=True,
                batch_size=len(images),
            )
        if index == 0:
            log_images(self.loggers, f"{part}/{name}", [*shown, made[:SHOWN]], self.global_step)
