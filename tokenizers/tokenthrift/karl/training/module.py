"""Training of KARL under Lightning: stage 1 fits a frozen base tokenizer, stage 2 tunes everything on pixels.

Source: KARL (arXiv 2507.07995), section 3 and appendix; see `stage` for what both share.

What differs: tokens may be guided for the first steps of stage 1 (see `guidance`). In stage 2 generator and
discriminator step in turn, each with its own optimizer over its own parameters, where the published code takes eight
discriminator steps for one of the generator, whose optimizer also holds the discriminators.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.config import KarlConfig
from tokenthrift.karl.feature_distance import FeatureDistance
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.training.data import ImageBatch
from tokenthrift.karl.training.discriminator import PatchDiscriminator
from tokenthrift.karl.training.draws import ImageDraws
from tokenthrift.karl.training.guidance import principal_components, token_targets
from tokenthrift.karl.training.losses import Lpips, adaptive_weight, discriminator_hinge, generator_hinge
from tokenthrift.karl.training.stage import NOISE, OPTIM, KarlModule, Pass, fast_attention
from tokenthrift.padding import length_mask
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import balanced

__all__ = ["KarlStage1Module", "KarlStage2Module"]

GUIDE_IMAGES = 1280  # whose principal components are found


class KarlStage1Module(KarlModule):
    """Stage 1: the base tokenizer is frozen; its codes, or its latents, are what the decoder has to predict.

    Args:
        config: of the model.
        optim: how it is trained.
        guide_until_step: steps in which tokens are taught to be a pyramid of the features, in their principal
            components, and the decoder to read it: a way to share the image out among tokens that a short run does not
            find alone.
        second_pass_start_step: steps before which there is no second pass.
        shared: what `KarlModule` takes.
    """

    mean: Tensor
    components: Tensor

    def __init__(
        self,
        config: KarlConfig,
        optim: OptimConfig = OPTIM,
        *,
        guide_until_step: int = 0,
        second_pass_start_step: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(config, optim, **shared)
        own = {"guide_until_step": guide_until_step, "second_pass_start_step": second_pass_start_step}
        self.save_hyperparameters(own)
        count = min(config.token_dim - 1, config.base.latent_channels)
        self.register_buffer("mean", torch.zeros(config.base.latent_channels))
        self.register_buffer("components", torch.zeros(count, config.base.latent_channels))

    def on_fit_start(self) -> None:
        """Finds the principal components of the features of some training images."""
        super().on_fit_start()
        if not self.hparams["guide_until_step"] or bool(self.components.any()):
            return
        images: Tensor = self.trainer.datamodule.training_images(GUIDE_IMAGES)  # type: ignore[attr-defined]
        with torch.no_grad():
            parts = [self.model.base.encode(part.to(self.device)) for part in images.split(64)]
            cells = torch.cat([self.model.base.rows(part) for part in parts]).flatten(0, 1).float()
            mean, components = principal_components(cells, len(self.components))
            self.mean.copy_(mean)
            self.components.copy_(components)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_and_schedule(parameter_groups(self.model, self.optim), self.optim, steps)

    def reconstruction_loss(self, output: Tensor, features: Tensor) -> Tensor:
        """How far a pass is from the base tokenizer's own features."""
        base = self.model.base
        targets = base.to_targets(features)
        if isinstance(base, AutoencoderKL):
            return F.mse_loss(output.float(), targets.float())
        book = base.codebook.detach()
        mean = output.float().softmax(-1) @ book.float()
        logits = output.float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten()) + F.mse_loss(mean, F.embedding(targets, book))

    def guided_loss(self, images: Tensor, features: Tensor, draws: ImageDraws) -> Tensor:
        """Tokens against the pyramid, and the decoder on the first some of it."""
        config = self.model.config
        targets = token_targets(features, config.max_tokens, self.mean, self.components, config.token_dim)
        count = targets.shape[1]
        counts = torch.full((len(images),), count, device=images.device)
        found = self.model.encode_latents(images, features, counts, self.curriculum.sample(draws))
        token_loss = F.mse_loss(found.tokens.float(), targets)
        noisy = F.normalize(F.normalize(targets, dim=-1) + NOISE * draws.normal_like(targets), dim=-1)
        keep = length_mask(draws.counts(count, 1), count)
        grid = (features.shape[2], features.shape[3])
        decoder_loss = self.reconstruction_loss(self.model.decode_latents(noisy, keep, grid), features)
        self.log_dict({"train/guide_tokens": token_loss, "train/guide_decoder": decoder_loss}, prog_bar=True)
        self.remember(found.tokens[found.mask])
        return token_loss + decoder_loss

    def training_step(self, batch: ImageBatch, index: int) -> Tensor:
        """Both passes; pixels are looked at to measure errors only."""
        h: Any = self.hparams
        images, draws = batch.images, ImageDraws(batch.seeds, batch.images.device)
        with fast_attention(self.device):
            with torch.no_grad():
                features = self.model.base.encode(images)
            if self.global_step < h.guide_until_step:
                return balanced(self.guided_loss(images, features, draws), len(images))
            counts = self.counts(draws)
            first = self.first_pass(images, features, counts, draws)
            first_loss = self.reconstruction_loss(first.output, features)
            self.log("train/first", first_loss, prog_bar=True)
            loss = balanced(first_loss, len(images)) + self.common_loss(first, None)
            self.remember(first.encoded.tokens[first.keep])
            if self.global_step < h.second_pass_start_step:
                return loss
            with torch.no_grad():
                achieved = pixel_error(self.decoded(first, features).clamp(0, 1), images)
            second = self.second_pass(images, features, self.second_targets(counts, achieved, draws), draws)
            second_loss = self.reconstruction_loss(second.output, features)
            loss = loss + balanced(second_loss, len(images)) + self.common_loss(second, counts)
        self.log("train/second", second_loss, prog_bar=True)
        self.log_passes(first, second, counts, achieved)
        self.remember(second.encoded.tokens[second.keep])
        return loss


class KarlStage2Module(KarlModule):
    """Stage 2: everything is trained, the base tokenizer too, on pixels.

    Args:
        config: of the model.
        optim: how it is trained.
        clip: largest norm of the gradient, of each optimizer.
        lpips_weight: of LPIPS, which needs torchvision's VGG-16 weights; 0 leaves it out.
        feature_weight: of EffNet-lite0 distance (`feature_distance.py`), which needs the extra `perceptual`; likewise.
        adversarial: weight of the adversarial loss from an epoch on, as {20: 0.2, 100: 0.8}; none if empty.
        discriminator_learning_rate: of the discriminator, which is otherwise trained like the model.
        shared: what `KarlModule` takes.
    """

    def __init__(
        self,
        config: KarlConfig,
        optim: OptimConfig = OPTIM,
        *,
        clip: float = 3.0,
        lpips_weight: float = 1.0,
        feature_weight: float = 0.0,
        adversarial: dict[int, float] | None = None,
        discriminator_learning_rate: float = 5.6e-5,
        **shared: Any,
    ) -> None:
        super().__init__(config, optim, **shared)
        own = {
            "clip": clip,
            "lpips_weight": lpips_weight,
            "feature_weight": feature_weight,
            "adversarial": adversarial,
            "discriminator_learning_rate": discriminator_learning_rate,
        }
        self.save_hyperparameters(own)
        self.automatic_optimization = False
        self.model.base.requires_grad_(True)
        if isinstance(self.model.base, Vqgan):
            self.model.base.codebook.requires_grad_(False)  # nothing but an argmin and a fixed table reads it
        self.lpips = Lpips() if lpips_weight else None
        # Kept out of the checkpoint: its weights are those of a package.
        self._feature_distance = [FeatureDistance()] if feature_weight else []
        self.discriminator = PatchDiscriminator() if adversarial else None

    def configure_optimizers(self) -> Any:
        """One optimizer for the model and, with an adversarial loss, one for the discriminator."""
        steps = int(self.trainer.estimated_stepping_batches)
        both = [optimizer_and_schedule(parameter_groups(self.model, self.optim), self.optim, steps)]
        if self.discriminator is not None:
            other = replace(self.optim, learning_rate=self.hparams["discriminator_learning_rate"])
            both.append(optimizer_and_schedule(parameter_groups(self.discriminator, other), other, steps))
        return [one["optimizer"] for one in both], [one["lr_scheduler"] for one in both]

    @property
    def adversarial_weight(self) -> float:
        """Of this epoch."""
        steps = {int(epoch): weight for epoch, weight in (self.hparams["adversarial"] or {}).items()}
        return max(((e, w) for e, w in steps.items() if e <= self.current_epoch), default=(0, 0.0))[1]

    def pixel_loss(self, one: Pass, features: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """A pass's images `(B, 3, H, W)`, and L1 plus perceptual distances."""
        made = self.decoded(one, features)
        loss = pixel_error(made, images).mean()
        if self.lpips is not None:
            loss = loss + self.hparams["lpips_weight"] * self.lpips(made, images).mean()
        for distances in self._feature_distance:
            loss = loss + self.hparams["feature_weight"] * distances.to(images.device)(made, images).mean()
        return made, loss

    def training_step(self, batch: ImageBatch, index: int) -> Tensor:
        """A step of the model and, once it takes part, one of the discriminator."""
        images, draws = batch.images, ImageDraws(batch.seeds, batch.images.device)
        weight = self.adversarial_weight
        optimizers = self.optimizers()
        generator, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        with fast_attention(self.device):
            features = self.model.base.encode(images)
            counts = self.counts(draws)
            first = self.first_pass(images, features, counts, draws)
            made, first_loss = self.pixel_loss(first, features, images)
            achieved = pixel_error(made.detach().clamp(0, 1), images)
            second = self.second_pass(images, features, self.second_targets(counts, achieved, draws), draws)
            made_again, second_loss = self.pixel_loss(second, features, images)
            pixels = first_loss + second_loss
            total = balanced(pixels, len(images)) + self.common_loss(first, None) + self.common_loss(second, counts)
            fakes = torch.cat([made, made_again])
            if self.discriminator is not None and weight:
                total = total + balanced(weight * self._adversarial(pixels, fakes), len(images))
            self._step(generator, total)
        if self.discriminator is not None and weight:
            hinge = discriminator_hinge(self.discriminator(images), self.discriminator(fakes.detach()))
            self._step(others[0], balanced(hinge, len(images)), counted=False)
            self.log("train/discriminator", hinge)
        self.log_dict({"train/first": first_loss.detach(), "train/second": second_loss.detach()}, prog_bar=True)
        self.log_passes(first, second, counts, achieved)
        self.remember(second.encoded.tokens[second.keep])
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
