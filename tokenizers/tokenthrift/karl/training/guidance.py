"""What tokens are taught first, on request: to be means of the features, coarse to fine.

Source: none; a short run does not find out alone how to share an image among tokens, and this lesson takes some
hundred steps. KARL (arXiv 2507.07995) trains for hundreds of epochs without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["principal_components", "pyramid", "token_targets"]

FAINTEST = 0.15  # of the largest component's deviation; smaller ones count for less
CONSTANT = 2.0


def pyramid(features: Tensor, most: int) -> Tensor:
    """Means of features over the whole, over quarters, over sixteenths and so on, coarse to fine.

    Args:
        features: `(B, C, h, w)`.
        most: means at most.

    Returns:
        `(B, N, C)`, N at most `most`; the finest are single cells.
    """
    sides, side = [], 1
    while side < 2 * max(features.shape[2:]):
        sides.append((min(side, features.shape[2]), min(side, features.shape[3])))
        side *= 2
    means = [F.adaptive_avg_pool2d(features, size).flatten(2).transpose(1, 2) for size in dict.fromkeys(sides)]
    return torch.cat(means, 1)[:, :most]


def principal_components(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean `(C,)` and the first principal components `(count, C)` of features `(N, C)`, each over its deviation."""
    mean = cells.mean(0)
    _, sizes, directions = torch.linalg.svd(cells - mean, full_matrices=False)
    deviations = (sizes / len(cells) ** 0.5).clamp(min=FAINTEST * sizes[0] / len(cells) ** 0.5)
    return mean, (directions / deviations[:, None])[:count]


def token_targets(features: Tensor, most: int, mean: Tensor, components: Tensor, token_dim: int) -> Tensor:
    """The pyramid in principal components, as tokens `(B, N, token_dim)`."""
    targets = (pyramid(features.float(), most) - mean) @ components.T
    # Tokens are scaled to length 1; with one number that is always the same the length of the others is not lost.
    targets = F.pad(targets, (0, 1), value=CONSTANT)
    return F.pad(targets, (0, token_dim - targets.shape[-1]))
