"""How sure a mean is: Student's interval over runs, splits or groups of items, and a bootstrap over items.

Source: scipy.stats; Nadeau and Bengio, "Inference for the generalization error" (2003) for splits. Published
results of the four systems come without any interval. Rank correlations:
`torchmetrics.functional.spearman_corrcoef`.
"""

import math
from collections.abc import Sequence

import numpy as np

from tokenthrift.extras import require

__all__ = ["bootstrap_interval", "grouped_interval", "mean_and_interval"]


def mean_and_interval(values: Sequence[float], *, test_to_training: float = 0.0) -> tuple[float, float]:
    """Mean of runs (seeds), and half the width of its 95 % interval.

    Random splits of one set of items are no independent runs, as their training items and their test items overlap.
    With `test_to_training` the variance of the mean of n splits is (1 / n + `test_to_training`) times that of a split:
    the corrected resampled t interval of Nadeau and Bengio.

    Args:
        values: one figure a run.
        test_to_training: test items for each training item, where runs are random splits of the same items; 0 where
            runs are independent.

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
    widening = math.sqrt(1 + len(values) * test_to_training)
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) * widening)


def grouped_interval(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float]:
    """Mean over items, and half the width of its 95 % interval over the groups that the items come from.

    Items of a group may be as alike as copies; only groups count as independent.

    Args:
        values: one figure an item.
        groups: the group of each.

    Returns:
        The mean and the half width (Student's t, degrees of freedom by groups), which is infinite for a single group.

    Raises:
        ValueError: there is no value, or not a group for each.
    """
    if not values or len(values) != len(groups):
        raise ValueError("a mean needs at least one value, and each its group")
    mean = math.fsum(values) / len(values)
    sums: dict[int, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    count = len(sums)
    if count == 1:
        return mean, math.inf
    variance = count / (count - 1) * math.fsum(total**2 for total in sums.values()) / len(values) ** 2
    return mean, float(require("scipy.stats").t.ppf(0.975, count - 1) * math.sqrt(variance))


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
