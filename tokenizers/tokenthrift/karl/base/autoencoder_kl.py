"""The other base tokenizer: the KL autoencoder of latent diffusion.

Source: arXiv 2112.10752, the 16-channel one that MAR trained on ImageNet; KARL (arXiv 2507.07995), section 3.

What differs: the published code feeds it images in [0, 1] where it was trained on [-1, 1], multiplies the latents by
0.2325 and never divides, and draws a random latent even at inference. Here images are in [0, 1] on the outside and
[-1, 1] on the inside, the scaling is undone, and the latent is the mean unless a generator is given. `released=True`
keeps the range and the scaling as published, which the published checkpoints have adapted to.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tokenthrift.karl.base.convolution import ConvDecoder, ConvEncoder
from tokenthrift.karl.config import BaseConfig

__all__ = ["AutoencoderKL"]


class AutoencoderKL(nn.Module):
    """Images to a grid of continuous latents and back.

    Args:
        config: sizes; `kind` "vae".
        released: compute as the published code does.
    """

    def __init__(self, config: BaseConfig, *, released: bool = False) -> None:
        super().__init__()
        self.config, self.released = config, released
        self.encoder = ConvEncoder(config)
        self.decoder = ConvDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `(B, latent_channels, h, w)`, unscaled, of images `(B, 3, H, W)` in [0, 1]."""
        moments = self.quant_conv(self.encoder(images if self.released else 2 * images - 1))
        mean, log_variance = moments.chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            generator: draws a latent of the posterior, as the published code always does; the mean if not given.

        Returns:
            `(B, latent_channels, H / factor, W / factor)`.
        """
        mean, log_variance = self.posterior(images)
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
            mean = mean + (0.5 * log_variance).exp() * noise.to(mean.device)
        return mean * self.config.scaling_factor

    def decode(self, features: Tensor) -> Tensor:
        """Scaled latents `(B, latent_channels, h, w)` to images `(B, 3, H, W)`, about [0, 1], not clipped."""
        if self.released:
            return cast(Tensor, self.decoder(self.post_quant_conv(features)))
        images = self.decoder(self.post_quant_conv(features / self.config.scaling_factor))
        return cast(Tensor, (images + 1) / 2)

    def rows(self, features: Tensor) -> Tensor:
        """`(B, latent_channels, h, w)` to what the latent encoder reads, `(B, h * w, latent_channels)`."""
        return features.flatten(2).transpose(1, 2)

    def to_targets(self, features: Tensor) -> Tensor:
        """The latents themselves, `(B, h * w, latent_channels)`."""
        return self.rows(features)

    def to_features(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predicted latents `(B, h * w, latent_channels)` as a map `(B, latent_channels, h, w)`."""
        features: Tensor = output.unflatten(1, grid).permute(0, 3, 1, 2)
        return features if self.released else features.contiguous()
