"""The convolutional encoder and decoder of both base tokenizers.

Sources: MaskGIT's VQGAN (arXiv 2202.04200) as MAGE trains it, and the KL autoencoder of latent diffusion (arXiv
2112.10752) as MAR trains it. KARL uses both as they are, and so do its checkpoints, whose tensor names are kept.

The MaskGIT style has convolutions without bias, average pooling, no attention, and a residual block whose shortcut is a
projection of its *output*: where the width changes, the block is no residual at all. That is part of the published
weights, so it stays.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.karl.config import BaseConfig

__all__ = ["ConvDecoder", "ConvEncoder"]


def _norm(channels: int, config: BaseConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, each behind a group normalization and a swish."""

    def __init__(self, inputs: int, outputs: int, config: BaseConfig) -> None:
        super().__init__()
        self.maskgit = config.kind == "vqgan"
        self.norm1 = _norm(inputs, config)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=not self.maskgit)
        self.norm2 = _norm(outputs, config)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not self.maskgit)
        self.nin_shortcut = None
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(outputs if self.maskgit else inputs, outputs, 1, bias=not self.maskgit)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(y if self.maskgit else x)
        return cast(Tensor, x + y)


class AttentionBlock(nn.Module):
    """Single-head attention over all positions of a map."""

    def __init__(self, channels: int, config: BaseConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return cast(Tensor, x + self.proj_out(y))


class Downsample(nn.Module):
    """Half the resolution by a convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbors, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Level(nn.Module):
    """The blocks of one resolution, and the step to the next."""

    def __init__(
        self,
        widths: list[int],
        config: BaseConfig,
        *,
        attention: bool = False,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b, config) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(b, config) for b in widths[1:]) if attention else None
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn is not None:
                x = self.attn[i](x)
        for step in (self.downsample, self.upsample):
            if step is not None:
                x = step(x)
        return x


class Middle(nn.Module):
    """Two blocks at the lowest resolution; the KL style has attention between them."""

    def __init__(self, channels: int, config: BaseConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.attn_1 = AttentionBlock(channels, config) if config.kind == "vae" else None
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if self.attn_1 is not None:
            x = self.attn_1(x)
        return cast(Tensor, self.block_2(x))


class ConvEncoder(nn.Module):
    """An image to a map of `latent_channels` channels (twice as many for the KL style: mean and log-variance)."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        maskgit, widths = config.kind == "vqgan", [config.channels * m for m in config.channel_multipliers]
        last = len(widths) - 1
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(3 * self.patch_size**2, config.channels, 3, padding=1, bias=not maskgit)
        levels, inputs = [], config.channels
        for i, width in enumerate(widths):
            step: nn.Module | None = None
            if i < last:
                step = nn.AvgPool2d(2) if maskgit else Downsample(width)
            around = [inputs] + [width] * config.num_res_blocks
            levels.append(Level(around, config, attention=not maskgit and i == last, downsample=step))
            inputs = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        outputs = config.latent_channels if maskgit else 2 * config.latent_channels
        self.conv_out = nn.Conv2d(widths[-1], outputs, 1 if maskgit else 3, padding=0 if maskgit else 1)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to `(B, C, H / factor, W / factor)`."""
        x = self.conv_in(F.pixel_unshuffle(images, self.patch_size))
        for level in self.down:
            x = level(x)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class ConvDecoder(nn.Module):
    """A map of `latent_channels` channels to an image; the KL style has one block more at each resolution."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        blocks = config.num_res_blocks if config.kind == "vqgan" else config.num_res_blocks + 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config)
        levels = []
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            levels.append(Level([above] + [width] * blocks, config, upsample=Upsample(width) if i else None))
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(widths[0], config)
        self.patch_size = config.patch_size
        self.conv_out = nn.Conv2d(widths[0], 3 * self.patch_size**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, latent_channels, h, w)` to `(B, 3, h * factor, w * factor)`."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(cast(Tensor, self.conv_out(F.silu(self.norm_out(x)))), self.patch_size)
