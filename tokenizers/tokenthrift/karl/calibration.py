"""Conditioning on a smaller error than the target, by just so much that misses are as rare as they have to be.

Source: split conformal prediction (Vovk et al. 2005); conformal risk control (Angelopoulos et al., arXiv 2208.02814).
KARL (arXiv 2507.07995) conditions the encoder on a target error and does not check what comes out; its own table 3
shows up to a third of the images above it. Here images that were not trained on are encoded once for each *request*, an
error to condition on, of a ladder. From their errors follows, for any later target, the request with which an image
misses the target with probability at most alpha, without a further pass.

The guarantee is about the next image, taken at random from where the calibration images came from, and holds for any
number of them, since the quantile has the finite-sample correction. It holds on average over calibration sets: the miss
rate of one set scatters around alpha, by about sqrt(alpha (1 - alpha) / n).

Why it is valid for any target: an image's errors are replaced by the largest error at this or a stricter request, which
can only grow along the ladder. So "misses at request r" is a monotone loss, and its quantiles are ordered too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.config import ConfigError

__all__ = ["Calibration", "conformal_quantile", "fit", "requested"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The error that an image stays within at each request, with probability 1 - alpha; part of a configuration."""

    alpha: float
    """Share of images that may miss."""
    images: int
    """How many the figures rest on."""
    tokens: int
    """Cap under which they were encoded; nothing is known of a lower one."""
    requests: tuple[float, ...]
    """Errors that the encoder was conditioned on, ascending."""
    bounds: tuple[float, ...]
    """The error that an image stays within at each request, never descending."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"calibration.alpha must be between 0 and 1, got {self.alpha}")
        if self.images < 1 or self.tokens < 1:
            raise ConfigError("calibration.images and tokens must be at least 1")
        if not self.requests or len(self.requests) != len(self.bounds):
            raise ConfigError("calibration needs as many bounds as requests, and at least one")
        if any(a >= b for a, b in pairwise(self.requests)) or any(a > b for a, b in pairwise(self.bounds)):
            raise ConfigError("calibration.requests must ascend, and bounds must not descend")

    def request(self, target: float) -> float:
        """The error to condition on, so that an image exceeds the target with probability at most alpha.

        Raises:
            BudgetError: no request keeps so small an error; the smallest target that one keeps is named.
        """
        found = [request for request, bound in zip(self.requests, self.bounds, strict=True) if bound <= target]
        if not found:
            # Rounded up, since the error named must itself be one that can be kept.
            least = math.ceil(self.bounds[0] * 1e4) / 1e4
            raise BudgetError(
                f"error {target:g} for all but {self.alpha:.0%} of images",
                f"errors from {least:g} for this model",
                f"e{least:g}",
            )
        return found[-1]


def fit(errors: Sequence[Sequence[float]], requests: Sequence[float], alpha: float, tokens: int) -> Calibration:
    """Calibrates.

    Args:
        errors: of every image at each request, in their order.
        requests: errors conditioned on, ascending.
        alpha: share of images that may miss.
        tokens: cap under which the images were encoded.

    Raises:
        ValueError: too few images for so small an alpha, or NaN among the errors.
    """
    if any(math.isnan(error) for row in errors for error in row):
        raise ValueError("an error to calibrate on is NaN")
    rows = [list(accumulate(row, max)) for row in errors]
    bounds = [conformal_quantile(column, alpha) for column in zip(*rows, strict=True)]
    return Calibration(alpha=alpha, images=len(rows), tokens=tokens, requests=tuple(requests), bounds=tuple(bounds))


def requested(
    calibration: Calibration | None, budgets: Sequence[TokenBudget], caps: Sequence[int]
) -> list[TokenBudget]:
    """Budgets with the error to condition on in place of the target.

    Args:
        calibration: of the model.
        budgets: of each image.
        caps: tokens that each may have.

    Raises:
        BudgetError: the model is not calibrated, a budget has no target, or its cap is below the one that the
            calibration rests on.
    """
    if calibration is None:
        raise BudgetError("a calibrated encoding", "a model with a calibration", "calibrated=False")
    out = []
    for budget, cap in zip(budgets, caps, strict=True):
        if budget.target_error is None:
            raise BudgetError("a calibrated encoding without target_error", "a target_error", "e0.05")
        if cap < calibration.tokens:
            raise BudgetError(
                f"a calibrated encoding of at most {cap} tokens",
                f"caps from {calibration.tokens} tokens, under which the model was calibrated",
                calibration.tokens,
            )
        out.append(replace(budget, target_error=calibration.request(budget.target_error)))
    return out


def conformal_quantile(values: Sequence[float], alpha: float) -> float:
    """The value that a further one, exchangeable with these, exceeds with probability at most alpha.

    Raises:
        ValueError: there are fewer than `1 / alpha - 1` values.
    """
    # The tolerance undoes the rounding of 1 - 0.1 and the like, which would ask for one value too many.
    rank = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9)
    if rank > len(values):
        raise ValueError(f"alpha {alpha:g} needs at least {math.ceil(1 / alpha - 1 - 1e-9)} images, not {len(values)}")
    return sorted(values)[rank - 1]
