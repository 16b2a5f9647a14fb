"""Which errors training conditions on: upside-down, image by image.

Source: KARL (arXiv 2507.07995), section 3. A first pass gives an image a random number of tokens and a target error
that it cannot achieve, so that it does its best. The error that it achieves is the target of the second pass, with the
number of tokens as the answer. The targets of the first pass start at or below 0.04 and fade, one per cent at a time,
where images have achieved them.

What differs: the state is in a buffer and counts the images of all processes, so it is saved, resumed and the same on
every device, where the published one is a plain tensor that each process has its own of and that a resumed run starts
anew. A bin fades by the share of images that achieved it, not wholly when the best image of the batch did. The
augmentation of the paper's text, which the published code no longer calls, is here: an image that needed all tokens
needs them for any smaller error, and one that needed the fewest needs no more for any greater one.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.karl.training.draws import ImageDraws
from tokenthrift.training.processes import rank_and_world

__all__ = ["ErrorCurriculum", "relabeled"]

FIRST = 0.04  # the greatest target at first
FADE = 0.01  # of a bin's probability, for each batch whose images have all achieved it


class ErrorCurriculum(nn.Module):
    """The distribution of the first pass's targets."""

    probability: Tensor
    bins: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bins", torch.tensor(ERROR_BINS), persistent=False)
        allowed = (self.bins <= FIRST).float()
        self.register_buffer("probability", allowed / allowed.sum())

    def sample(self, draws: ImageDraws) -> Tensor:
        """Target errors `(B,)`."""
        chosen = torch.searchsorted(self.probability.cumsum(0), draws.uniform(), right=True)
        last = int(self.probability.nonzero().max())  # the sum may round to less than 1
        return self.bins[chosen.clamp(max=last)]

    @torch.no_grad()
    def update(self, achieved: Tensor) -> None:
        """Lets the bins fade that images of a batch have achieved.

        Args:
            achieved: `(B,)` errors of the first pass.
        """
        counts = torch.cat([(achieved[:, None] <= self.bins).float().sum(0), achieved.new_tensor([len(achieved)])])
        if rank_and_world()[1] > 1:
            distributed.all_reduce(counts)
        faded = self.probability * (1 - FADE * counts[:-1] / counts[-1])
        self.probability.copy_(faded / faded.sum())


def relabeled(errors: Tensor, counts: Tensor, least: int, most: int, prob: float, draws: ImageDraws) -> Tensor:
    """Errors that have the same answer as the ones achieved, where the answer is an extreme.

    Args:
        errors: `(B,)` achieved with `counts` tokens.
        counts: `(B,)`.
        least: the fewest tokens that are drawn.
        most: the most.
        prob: that the error of an image at an extreme is replaced.
        draws: of the images.

    Returns:
        `(B,)`: for images with `most` tokens a smaller error, for those with `least` a greater one.
    """
    share, chosen = draws.uniform().to(errors), draws.uniform().to(errors) < prob
    smaller = errors - share * (errors - ERROR_BINS[0]).clamp(min=0)
    greater = errors + share * (ERROR_BINS[-1] - errors).clamp(min=0)
    errors = torch.where(chosen & (counts >= most), smaller, errors)
    return torch.where(chosen & (counts <= least), greater, errors)
