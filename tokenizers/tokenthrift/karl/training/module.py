"""Training of KARL under Lightning: stage 1 distils a frozen base tokenizer, stage 2 tunes everything on pixels.

Source: KARL (arXiv 2507.07995), section 3 and appendix; see `stage` for what both share.

What differs: tokens may be guided by a pyramid of means for the first steps of stage 1. In stage 2 generator and
discriminator step in turn, each with its own optimizer over its own parameters, where the published code takes eight
discriminator steps for one of the generator, whose optimizer also holds the discriminators.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.training.curriculum import draw_counts
from tokenthrift.karl.training.discriminator import PatchDiscriminator
from tokenthrift.karl.training.losses import Lpips, adaptive_weight, discriminator_hinge, generator_hinge, pixel_error
from tokenthrift.karl.training.optimisation import adamw
from tokenthrift.karl.training.stage import NOISE, KarlModule, Pass, fast_attention

__all__ = ["KarlStage1Module", "KarlStage2Module", "pyramid"]

GUIDE_BATCHES = 20  # whose principal components are found
FAINTEST = 0.15  # of the largest component's deviation; smaller ones count for less
CONSTANT = 2.0


def pyramid(features: Tensor, most: int) -> Tensor:
    """Means of features over the whole, over quarters, over sixteenths and so on, coarse to fine.

    Args:
        features: `(B, C, h, w)`.
        most: means that are wanted.

    Returns:
        `(B, N, C)`, N at most `most`; the finest are single cells.
    """
    sides, side = [], 1
    while side < 2 * max(features.shape[2:]):
        sides.append((min(side, features.shape[2]), min(side, features.shape[3])))
        side *= 2
    means = [F.adaptive_avg_pool2d(features, size).flatten(2).transpose(1, 2) for size in dict.fromkeys(sides)]
    return torch.cat(means, 1)[:, :most]


class KarlStage1Module(KarlModule):
    """Stage 1: the base tokenizer is frozen; its codes, or its latents, are what the decoder has to predict.

    Args:
        model: fields of a `KarlConfig`.
        guide_until_step: steps in which tokens are taught to be a pyramid of the features, in their principal components,
            and the decoder to read it: a way to share the image out among tokens that a short run does not find alone.
        second_pass_start_step: steps before which there is no second pass.
        shared: what `KarlModule` takes.
    """

    mean: Tensor
    components: Tensor

    def __init__(
        self, model: dict[str, Any], *, guide_until_step: int = 0, second_pass_start_step: int = 0, **shared: Any
    ) -> None:
        super().__init__(model, **shared)
        self.save_hyperparameters()
        config = self.model.config
        count = min(config.token_dim - 1, config.base.latent_channels)
        self.register_buffer("mean", torch.zeros(config.base.latent_channels))
        self.register_buffer("components", torch.zeros(count, config.base.latent_channels))

    def on_fit_start(self) -> None:
        """Finds the principal components of the features of the first training images."""
        super().on_fit_start()
        if not self.hparams["guide_until_step"] or bool(self.components.any()):
            return
        batches = islice(self.trainer.datamodule.train_dataloader(), GUIDE_BATCHES)  # type: ignore[attr-defined]
        with torch.no_grad():
            cells = torch.cat([self.model.base.rows(self.model.base.encode(b.to(self.device))) for b in batches])
        cells = cells.flatten(0, 1).float()
        self.mean.copy_(cells.mean(0))
        _, sizes, directions = torch.linalg.svd(cells - self.mean, full_matrices=False)
        deviations = (sizes / len(cells) ** 0.5).clamp(min=FAINTEST * sizes[0] / len(cells) ** 0.5)
        self.components.copy_((directions / deviations[:, None])[: len(self.components)])

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        h: Any = self.hparams
        optimizer = adamw(self.model.parameters(), h.learning_rate, h.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": self._schedule(optimizer)}

    def distillation_loss(self, output: Tensor, features: Tensor) -> Tensor:
        """How far a pass is from the base tokenizer's own features."""
        base = self.model.base
        targets = base.to_targets(features)
        if isinstance(base, AutoencoderKL):
            return F.mse_loss(output.float(), targets.float())
        book = base.codebook.detach()
        mean = output.float().softmax(-1) @ book.float()
        logits = output.float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten()) + F.mse_loss(mean, F.embedding(targets, book))

    def guided_loss(self, images: Tensor, features: Tensor) -> Tensor:
        """Tokens against the pyramid, and the decoder on the first some of it."""
        wanted = (pyramid(features.float(), self.model.config.max_tokens) - self.mean) @ self.components.T
        # Tokens are scaled to length 1; one number that is always the same lets the length of the others be told.
        wanted = F.pad(wanted, (0, 1), value=CONSTANT)
        wanted = F.pad(wanted, (0, self.model.config.token_dim - wanted.shape[-1]))
        told = wanted.shape[1]
        counts = torch.full((len(images),), told, device=images.device)
        found = self.model.encode_latents(images, features, counts, self.curriculum.sample(len(images)))
        taught = F.mse_loss(found.tokens.float(), wanted)
        noisy = F.normalize(F.normalize(wanted, dim=-1) + NOISE * torch.randn_like(wanted), dim=-1)
        some = draw_counts(len(images), told, 1, images.device)
        keep = torch.arange(told, device=images.device) < some[:, None]
        grid = (features.shape[2], features.shape[3])
        read = self.distillation_loss(self.model.decode_latents(noisy, keep, grid), features)
        self.log_dict({"train/taught": taught, "train/read": read}, prog_bar=True)
        self.offer(found.tokens[found.mask])
        return taught + read

    def training_step(self, images: Tensor, index: int) -> Tensor:
        """Both passes; pixels are looked at to measure errors only."""
        h: Any = self.hparams
        with fast_attention(self.device):
            with torch.no_grad():
                features = self.model.base.encode(images)
            if self.global_step < h.guide_until_step:
                return self.guided_loss(images, features)
            counts = self.counts(images)
            first = self.first_pass(images, features, counts)
            distilled = self.distillation_loss(first.output, features)
            self.log("train/first", distilled, prog_bar=True)
            loss = distilled + self.common_loss(first, None)
            self.offer(first.distilled.tokens[first.keep])
            if self.global_step < h.second_pass_start_step:
                return loss
            with torch.no_grad():
                reached = pixel_error(self.decoded(first, features).clamp(0, 1), images)
            second = self.second_pass(images, features, self.answers(counts, reached))
            again = self.distillation_loss(second.output, features)
            loss = loss + again + self.common_loss(second, counts)
        self.log("train/second", again, prog_bar=True)
        self.log_passes(first, second, counts, reached)
        self.offer(second.distilled.tokens[second.keep])
        return loss


class KarlStage2Module(KarlModule):
    """Stage 2: everything is trained, the base tokenizer too, on pixels.

    Args:
        model: fields of a `KarlConfig`.
        clip: largest norm of the gradient, of each optimizer.
        lpips_weight: of LPIPS, which needs torchvision's VGG-16 weights; 0 leaves it out.
        adversarial: weight of the adversarial loss from an epoch on, as {20: 0.2, 100: 0.8}; none if empty.
        discriminator_rate: learning rate of the discriminator.
        shared: what `KarlModule` takes.
    """

    def __init__(
        self,
        model: dict[str, Any],
        *,
        clip: float = 3.0,
        lpips_weight: float = 1.0,
        adversarial: dict[int, float] | None = None,
        discriminator_rate: float = 5.6e-5,
        **shared: Any,
    ) -> None:
        super().__init__(model, **shared)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.model.base.requires_grad_(True)
        if isinstance(self.model.base, Vqgan):
            self.model.base.codebook.requires_grad_(False)  # nothing but an argmin and a fixed table reads it
        self.lpips = Lpips() if lpips_weight else None
        self.discriminator = PatchDiscriminator() if adversarial else None

    def configure_optimizers(self) -> Any:
        """One optimizer for the model and, with an adversarial loss, one for the discriminator."""
        h: Any = self.hparams
        both = [adamw(self.model.parameters(), h.learning_rate, h.weight_decay)]
        if self.discriminator is not None:
            both.append(adamw(self.discriminator.parameters(), h.discriminator_rate, h.weight_decay))
        return both, [self._schedule(one) for one in both]

    @property
    def adversarial_weight(self) -> float:
        """Of this epoch."""
        steps = {int(epoch): weight for epoch, weight in (self.hparams["adversarial"] or {}).items()}
        return max(((e, w) for e, w in steps.items() if e <= self.current_epoch), default=(0, 0.0))[1]

    def pixel_loss(self, one: Pass, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """A pass's images `(B, 3, H, W)`, and L1 plus LPIPS."""
        made = self.decoded(one, features)
        loss = pixel_error(made, images).mean()
        if self.lpips is not None:
            loss = loss + self.hparams["lpips_weight"] * self.lpips(made, images).mean()
        return made, loss

    def training_step(self, images: Tensor, index: int) -> Tensor:
        """A step of the model and, once it takes part, one of the discriminator."""
        weight = self.adversarial_weight
        optimizers = self.optimizers()
        generator, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        with fast_attention(self.device):
            features = self.model.base.encode(images)
            counts = self.counts(images)
            first = self.first_pass(images, features, counts)
            made, loss = self.pixel_loss(first, features, images)
            reached = pixel_error(made.detach().clamp(0, 1), images)
            second = self.second_pass(images, features, self.answers(counts, reached))
            again, loss_again = self.pixel_loss(second, features, images)
            pixels = loss + loss_again
            total = pixels + self.common_loss(first, None) + self.common_loss(second, counts)
            fakes = torch.cat([made, again])
            if self.discriminator is not None and weight:
                total = total + weight * self._adversarial(pixels, fakes)
            self._step(generator, total)
        if self.discriminator is not None and weight:
            judged = discriminator_hinge(self.discriminator(images), self.discriminator(fakes.detach()))
            self._step(others[0], judged, counted=False)
            self.log("train/discriminator", judged)
        self.log_dict({"train/first": loss.detach(), "train/second": loss_again.detach()}, prog_bar=True)
        self.log_passes(first, second, counts, reached)
        self.offer(second.distilled.tokens[second.keep])
        return total.detach()

    def _adversarial(self, pixels: Tensor, fakes: Tensor) -> Tensor:
        assert self.discriminator is not None
        # The discriminator's weights are constants here: their own optimizer is the only one that moves them.
        self.discriminator.requires_grad_(False)
        fooled = generator_hinge(self.discriminator(fakes))
        self.discriminator.requires_grad_(True)
        last = self.model.base.decoder.conv_out.weight
        return adaptive_weight(pixels, fooled, last) * fooled

    def _step(self, optimizer: Any, loss: Tensor, counted: bool = True) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, self.hparams["clip"], "norm")
        if counted:
            optimizer.step()
        else:
            # Lightning's optimizer would count: `max_steps`, the schedule, restarts, checkpoints and the average of the
            # weights go by `global_step`, which has to be the number of batches.
            self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler.optimizer is optimizer.optimizer:
                scheduler.step()
