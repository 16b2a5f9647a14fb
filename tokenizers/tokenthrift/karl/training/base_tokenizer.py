"""Training of a base tokenizer under Lightning, for those who have none.

Source: the KL autoencoder of latent diffusion (arXiv 2112.10752) and MaskGIT's VQGAN (arXiv 2202.04200). KARL takes
both ready-made for 256 px; small images need one of their own.

What differs: pixel L1, and LPIPS on request, without an adversarial loss, which is for the last stage of KARL. The KL
term is a mean over latents instead of a sum, so that its weight does not depend on the size of the image; it keeps
latents near unit variance, as the regression of stage 1 needs.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tokenthrift.config import to_plain
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.config import BaseConfig
from tokenthrift.karl.feature_distance import FeatureDistance
from tokenthrift.karl.training.data import ImageBatch, source_name
from tokenthrift.karl.training.draws import ImageDraws
from tokenthrift.karl.training.image_log import log_images
from tokenthrift.karl.training.losses import Lpips
from tokenthrift.training.optim import OptimConfig, optimizer_and_schedule, parameter_groups
from tokenthrift.training.processes import balanced

__all__ = ["KarlBaseModule"]

OPTIM = OptimConfig(weight_decay=0.0, betas=(0.9, 0.95), warmup_steps=100, min_lr=1e-6)
FIRST_LOG_VARIANCE = -6.0
SHOWN = 12  # images in a row of the logged ones


@torch.no_grad()
def init_weights(base: Vqgan | AutoencoderKL) -> None:
    """Weights to start from with which short runs get somewhere: residual blocks that do nothing yet, little noise."""
    modules = dict(base.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith("conv2") and name.removesuffix("conv2") + "nin_shortcut" not in modules:
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(base, AutoencoderKL) and base.quant_conv.bias is not None:
        # At unit variance noise drowns the latents, and a short run never learns to use them.
        base.quant_conv.bias[base.config.latent_channels :] = FIRST_LOG_VARIANCE


class KarlBaseModule(L.LightningModule):
    """Trains a VQGAN or a KL VAE.

    Args:
        config: of the base tokenizer.
        optim: how it is trained.
        kl_weight: of the mean KL divergence per latent (VAE).
        lpips_weight: of LPIPS, which needs torchvision's VGG-16 weights; 0 leaves it out.
        feature_weight: of EffNet-lite0 distance (`feature_distance.py`), which needs the extra `perceptual`; likewise.
    """

    def __init__(
        self,
        config: BaseConfig,
        optim: OptimConfig = OPTIM,
        kl_weight: float = 1e-3,
        lpips_weight: float = 0.0,
        feature_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["config", "optim"])
        self.save_hyperparameters({"config": to_plain(config), "optim": to_plain(optim)})
        self.config, self.optim = config, optim
        kind = Vqgan if config.kind == "vqgan" else AutoencoderKL
        self.base: Vqgan | AutoencoderKL = kind(config)
        init_weights(self.base)
        self.lpips = Lpips() if lpips_weight else None
        # Kept out of the checkpoint: its weights are those of a package.
        self._feature_distance = [FeatureDistance()] if feature_weight else []

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        steps = int(self.trainer.estimated_stepping_batches)
        return optimizer_and_schedule(parameter_groups(self.base, self.optim), self.optim, steps)

    def forward(self, images: Tensor, draws: ImageDraws) -> tuple[Tensor, Tensor]:
        """Reconstructions of images `(B, 3, H, W)` through a random latent or the codebook, and what that costs."""
        if isinstance(self.base, Vqgan):
            found = self.base.quantize(self.base.encode(images))
            return self.base.decode(found.features), found.loss
        mean, log_variance = self.base.posterior(images)
        cost = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        latent = mean + (0.5 * log_variance).exp() * draws.normal_like(mean)
        return self.base.decode(latent * self.config.scaling_factor), self.hparams["kl_weight"] * cost

    def training_step(self, batch: ImageBatch, index: int) -> Tensor:
        """Pixel L1, perceptual distance, and the cost of the latent."""
        images = batch.images
        made, cost = self(images, ImageDraws(batch.seeds, images.device))
        pixel = (made - images).abs().mean()
        loss: Tensor = pixel + cost
        if self.lpips is not None:
            distance = self.lpips(made, images).mean()
            self.log("train/lpips", distance)
            loss = loss + self.hparams["lpips_weight"] * distance
        for distances in self._feature_distance:
            distance = distances.to(images.device)(made, images).mean()
            self.log("train/feature_distance", distance)
            loss = loss + self.hparams["feature_weight"] * distance
        self.log_dict({"train/l1": pixel, "train/latent": cost}, prog_bar=True)
        return balanced(loss, len(images))

    def validation_step(self, batch: ImageBatch, index: int, dataloader_idx: int = 0) -> None:
        """Pixel L1 of what `Karl` will use: the mean latent, or the features before the codebook."""
        self._evaluate(batch.images, index, "val", dataloader_idx)

    def test_step(self, batch: ImageBatch, index: int, dataloader_idx: int = 0) -> None:
        """The same of the test images."""
        self._evaluate(batch.images, index, "test", dataloader_idx)

    def _evaluate(self, images: Tensor, index: int, part: str, loader: int) -> None:
        features = self.base.encode(images)
        made = self.base.decode(features).clamp(0, 1)
        name = source_name(self.trainer, part, loader)
        shared: dict[str, Any] = {"add_dataloader_idx": False, "sync_dist": True, "batch_size": len(images)}
        self.log(f"{part}/l1_{name}", (made - images).abs().mean(), prog_bar=True, **shared)
        self.log(f"{part}/std_{name}", features.std(), **shared)
        if index == 0:
            log_images(self.loggers, f"{part}/base_{name}", [images[:SHOWN], made[:SHOWN]], self.global_step)
