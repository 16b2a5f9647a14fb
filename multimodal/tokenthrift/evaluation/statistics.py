"""How sure a mean is: Student's interval over runs, and a bootstrap over items.

Source: textbook statistics. Published results of the four systems come without any interval.
Rank correlations: `torchmetrics.functional.spearman_corrcoef`.
"""

import math
from collections.abc import Sequence

import torch

__all__ = ["bootstrap_interval", "mean_and_interval"]

# Two-sided 95 % quantiles of Student's distribution for 1 to 30 degrees of freedom; 1.96 beyond.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent runs (seeds), and half the width of its 95 % interval.

    Args:
        values: one figure a run.

    Returns:
        The mean and the half width, which is infinite for a single run.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _STUDENT[count - 2] if count - 1 <= len(_STUDENT) else 1.96
    return mean, quantile * deviation / math.sqrt(count)


def bootstrap_interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over items, and the 2.5 % and 97.5 % quantiles of the mean of resampled items.

    Args:
        values: one figure an item.
        draws: resamples.
        seed: of the resampling; the global random state is not touched.

    Returns:
        Mean, lower end, upper end.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    items = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [items[torch.randint(len(items), (len(items),), generator=generator)].mean() for _ in range(draws)]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return items.mean().item(), low, high
