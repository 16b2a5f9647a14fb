"""Which errors training asks for: upside-down, image by image.

Source: KARL (arXiv 2507.07995), section 3. A first pass gives an image a random number of tokens and asks for an error
that it cannot reach, so that it does its best; the error that it reaches is what the second pass asks for, with the
number of tokens as the answer. The bins that the first pass asks for start at or below 0.04 and fade, one per cent at a
time, where images have reached them.

What differs: the state is in a buffer, so it is saved, resumed and the same on every device, where the published one is
a plain tensor that each process has its own of and that a resumed run starts anew. A bin fades by the share of images
that reached it, not wholly when the best image of the batch did. The augmentation of the paper's text, which the
published code no longer calls, is here: an image that needed all tokens needs them for any smaller error, and one that
needed the fewest is content with any greater one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenthrift.karl.config import ERROR_BINS

__all__ = ["ErrorCurriculum", "draw_counts", "other_errors"]

FIRST = 0.04  # the greatest bin that is asked for at first
FADE = 0.01  # of a bin's probability, for each batch whose images have all reached it


class ErrorCurriculum(nn.Module):
    """The distribution of errors that the first pass asks for."""

    probability: Tensor
    bins: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bins", torch.tensor(ERROR_BINS), persistent=False)
        allowed = (self.bins <= FIRST).float()
        self.register_buffer("probability", allowed / allowed.sum())

    def sample(self, count: int) -> Tensor:
        """Errors `(count,)`, by the global generator."""
        return self.bins[torch.multinomial(self.probability, count, replacement=True)]

    @torch.no_grad()
    def update(self, reached: Tensor) -> None:
        """Lets the bins fade that images of a batch have reached.

        Args:
            reached: `(B,)` errors of the first pass.
        """
        share = (reached[:, None] <= self.bins).float().mean(0)
        faded = self.probability * (1 - FADE * share)
        self.probability.copy_(faded / faded.sum())


def draw_counts(batch: int, most: int, step: int, device: torch.device) -> Tensor:
    """Tokens for each image `(batch,)` int64: uniform over `step`, `2 * step`, up to `most`."""
    return step * torch.randint(1, most // step + 1, (batch,), device=device)


def other_errors(errors: Tensor, counts: Tensor, least: int, most: int, share: float) -> Tensor:
    """Errors that have the same answer as the ones reached, where the answer is an extreme.

    Args:
        errors: `(B,)` reached with `counts` tokens.
        counts: `(B,)`.
        least: the fewest tokens that are drawn.
        most: the most.
        share: of the images at an extreme whose error is exchanged.

    Returns:
        `(B,)`: for images with `most` tokens a smaller error, for those with `least` a greater one.
    """
    place = torch.rand_like(errors)
    chosen = torch.rand_like(errors) < share
    smaller = errors - place * (errors - ERROR_BINS[0]).clamp(min=0)
    greater = errors + place * (ERROR_BINS[-1] - errors).clamp(min=0)
    errors = torch.where(chosen & (counts >= most), smaller, errors)
    return torch.where(chosen & (counts <= least), greater, errors)
