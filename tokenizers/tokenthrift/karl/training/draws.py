"""What a training step draws for an image: the same whatever its neighbors, the number of processes, or a resume.

KARL (arXiv 2507.07995) draws one number of tokens for a whole batch, from a global generator; here every image has a
generator of its own, seeded by its index in the data and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ImageDraws"]


class ImageDraws:
    """Random numbers of the images of a batch; each call draws new ones.

    Args:
        seeds: of each image.
        device: of the numbers.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators, self.device = [torch.Generator().manual_seed(seed) for seed in seeds], device

    def uniform(self) -> Tensor:
        """`(B,)` in [0, 1)."""
        return torch.cat([torch.rand(1, generator=one) for one in self.generators]).to(self.device)

    def normal_like(self, values: Tensor) -> Tensor:
        """Normal noise in the shape of `values`, `(B, ...)`, and in its precision."""
        parts = [torch.randn(values.shape[1:], generator=one) for one in self.generators]
        return torch.stack(parts).to(values)

    def counts(self, most: int, step: int) -> Tensor:
        """Numbers of tokens `(B,)` int64: uniform over `step`, `2 * step`, up to `most`."""
        drawn = [torch.randint(1, most // step + 1, (1,), generator=one) for one in self.generators]
        return step * torch.cat(drawn).to(self.device)
