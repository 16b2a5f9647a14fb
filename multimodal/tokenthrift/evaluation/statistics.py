"""How sure a mean is: Student's interval over runs, and a bootstrap over items.

Source: scipy.stats. Published results of the four systems come without any interval. Rank correlations:
`torchmetrics.functional.spearman_corrcoef`.
"""

import math
from collections.abc import Sequence

import numpy as np

from tokenthrift.extras import require

__all__ = ["bootstrap_interval", "mean_and_interval"]


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
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.inf
    stats = require("scipy.stats")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


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
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, mean, mean
    found = require("scipy.stats").bootstrap(
        (values,),
        np.mean,
        n_resamples=draws,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)
