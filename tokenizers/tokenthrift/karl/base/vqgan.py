"""The base tokenizer that KARL's default uses: MaskGIT's VQGAN.

Source: MaskGIT (arXiv 2202.04200), in the form that MAGE trained on ImageNet; KARL (arXiv 2507.07995), section 3.
KARL reads the features *before* quantization and predicts codes; the features it decodes are the mean of the codebook
under the predicted probabilities, never one code.

What differs: the published code runs only where there are as many channels as grid cells (256); here any grid will do.
It also decodes features laid out channels-last, for which group normalization on the CPU is less exact (6e-4 off on the
reference image); `released=True` does the same, otherwise the layout is the exact one.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.karl.base.convolution import ConvDecoder, ConvEncoder
from tokenthrift.karl.config import BaseConfig

__all__ = ["BaseCodes", "Vqgan"]


class BaseCodes(NamedTuple):
    """Quantized features of the base tokenizer, for training it."""

    features: Tensor
    """`(B, C, h, w)`, with the gradient of what was quantized."""
    codes: Tensor
    """`(B, h * w)` int64."""
    loss: Tensor
    """Codebook and commitment loss."""


class Vqgan(nn.Module):
    """Images to a grid of features and back, with a codebook for the targets.

    Args:
        config: sizes; `kind` "vqgan".
        released: compute as the published code does.
    """

    def __init__(self, config: BaseConfig, *, released: bool = False) -> None:
        super().__init__()
        self.config, self.released = config, released
        self.encoder = ConvEncoder(config)
        self.decoder = ConvDecoder(config)
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.latent_channels))
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Continuous features, before quantization.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            generator: not needed; the VAE's encoder is random.

        Returns:
            `(B, latent_channels, H / factor, W / factor)`.
        """
        return cast(Tensor, self.encoder(images))

    def decode(self, features: Tensor) -> Tensor:
        """`(B, latent_channels, h, w)` to images `(B, 3, h * factor, w * factor)`, about [0, 1], not clipped."""
        return cast(Tensor, self.decoder(features))

    def rows(self, features: Tensor) -> Tensor:
        """`(B, latent_channels, h, w)` to what the latent encoder reads, `(B, h * w, latent_channels)`."""
        return features.flatten(2).transpose(1, 2)

    def to_targets(self, features: Tensor) -> Tensor:
        """Nearest codes `(B, h * w)` int64 of features `(B, latent_channels, h, w)`."""
        rows = self.rows(features).float()
        codebook = self.codebook.float()
        # ||z||^2 is the same for all codes of a row and is left out.
        distance = codebook.square().sum(1) - 2 * rows @ codebook.T
        return distance.argmin(-1)

    def to_features(self, output: Tensor, grid: tuple[int, int]) -> Tensor:
        """The mean code under predicted probabilities.

        Args:
            output: logits `(B, h * w, codebook_size)`.
            grid: `(h, w)`.

        Returns:
            `(B, latent_channels, h, w)`.
        """
        mean = output.softmax(-1) @ self.codebook.to(output.dtype)
        features: Tensor = mean.unflatten(1, grid).permute(0, 3, 1, 2)
        return features if self.released else features.contiguous()

    def quantize(self, features: Tensor) -> BaseCodes:
        """Quantized features for training the base tokenizer itself.

        Args:
            features: `(B, latent_channels, h, w)` as `encode` gives them.
        """
        codes = self.to_targets(features)
        found = F.embedding(codes, self.codebook).transpose(1, 2).reshape(features.shape)
        loss = F.mse_loss(found, features.detach()) + 0.25 * F.mse_loss(features, found.detach())
        return BaseCodes(features + (found - features).detach(), codes, loss)
