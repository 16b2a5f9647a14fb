"""Training of a base tokenizer under Lightning, for those who have none.

Source: the KL autoencoder of latent diffusion (arXiv 2112.10752) and MaskGIT's VQGAN (arXiv 2202.04200). KARL takes
both ready-made for 256 px; small images need one of their own.

What differs: pixel L1, and LPIPS on request, without an adversarial loss, which is
for the last stage of KARL. The KL term is a mean over latents instead of a sum, so that its weight does not depend on
the size of the image; it keeps latents near unit variance, which is what the regression of stage 1 wants.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tokenthrift.config import from_plain
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.config import BaseConfig
from tokenthrift.karl.training.data import source_name
from tokenthrift.karl.training.image_log import draw, sheet
from tokenthrift.karl.training.losses import Lpips
from tokenthrift.karl.training.optimisation import adamw
from tokenthrift.training.schedule import warmup_cosine

__all__ = ["KarlBaseModule"]

FIRST_LOG_VARIANCE = -6.0
SHOWN = 12  # images in a picture of reconstructions


@torch.no_grad()
def begin(base: Vqgan | AutoencoderKL) -> None:
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
        base: fields of a `BaseConfig`.
        learning_rate: peak of the schedule.
        warmup_steps: of linear warm-up, before the cosine.
        weight_decay: of everything but vectors.
        kl_weight: of the mean KL divergence per latent (VAE).
        lpips_weight: of LPIPS, which needs torchvision's VGG-16 weights; 0 leaves it out.
    """

    def __init__(
        self,
        base: dict[str, Any],
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        kl_weight: float = 1e-3,
        lpips_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = from_plain(BaseConfig, base, "base")
        kind = Vqgan if self.config.kind == "vqgan" else AutoencoderKL
        self.base: Vqgan | AutoencoderKL = kind(self.config)
        begin(self.base)
        self.lpips = Lpips() if lpips_weight else None

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        h: Any = self.hparams
        optimizer = adamw(self.base.parameters(), h.learning_rate, h.weight_decay)
        schedule = warmup_cosine(optimizer, int(self.trainer.estimated_stepping_batches), h.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions of images `(B, 3, H, W)` through a random latent or the codebook, and what that costs."""
        if isinstance(self.base, Vqgan):
            found = self.base.quantize(self.base.encode(images))
            return self.base.decode(found.features), found.loss
        mean, log_variance = self.base.posterior(images)
        cost = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.base.decode(latent * self.config.scaling_factor), self.hparams["kl_weight"] * cost

    def training_step(self, images: Tensor, index: int) -> Tensor:
        """Pixel L1, perceptual distance, and the cost of the latent."""
        made, cost = self(images)
        pixel = (made - images).abs().mean()
        loss: Tensor = pixel + cost
        if self.lpips is not None:
            distance = self.lpips(made, images).mean()
            self.log("train/lpips", distance)
            loss = loss + self.hparams["lpips_weight"] * distance
        self.log_dict({"train/l1": pixel, "train/latent": cost}, prog_bar=True)
        return loss

    def validation_step(self, images: Tensor, index: int, dataloader_idx: int = 0) -> None:
        """Pixel L1 of what `Karl` will use: the mean latent, or the features before the codebook."""
        self._judge(images, index, "val", dataloader_idx)

    def test_step(self, images: Tensor, index: int, dataloader_idx: int = 0) -> None:
        """The same of the test images."""
        self._judge(images, index, "test", dataloader_idx)

    def _judge(self, images: Tensor, index: int, part: str, loader: int) -> None:
        features = self.base.encode(images)
        made = self.base.decode(features).clamp(0, 1)
        name = source_name(self.trainer, part, loader)
        self.log(f"{part}/l1_{name}", (made - images).abs().mean(), add_dataloader_idx=False, prog_bar=True)
        self.log(f"{part}/std_{name}", features.std(), add_dataloader_idx=False)
        if index == 0:
            draw(self.logger, f"{part}/base_{name}", sheet([images[:SHOWN], made[:SHOWN]]), self.global_step)
