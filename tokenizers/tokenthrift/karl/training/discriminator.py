"""The discriminator of the last stage: it rates patches, not images.

Source: PatchGAN (arXiv 1611.07004) as VQGAN uses it (arXiv 2012.09841): 64 channels, three halvings, hinge loss.

What differs: group normalization in place of batch normalization, so that the logits of an image do not depend on the
others and there are no running statistics that an average of the weights would miss. One discriminator for all token
counts, as the paper says; the published code has eight.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

from torch import Tensor, nn

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Logits of every overlapping patch.

    Args:
        channels: after the first convolution; doubled by each further one, up to eight times.
        halvings: of the resolution.
    """

    def __init__(self, channels: int = 64, halvings: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(halvings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < halvings else 1
            layers += [nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False), nn.GroupNorm(8, outputs)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1, h, w)`, positive for real, of images `(B, 3, H, W)` in [0, 1]."""
        return cast(Tensor, self.layers(2 * images - 1))
