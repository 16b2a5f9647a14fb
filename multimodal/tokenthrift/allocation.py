"""One budget over many items: how a context window is shared between pictures, clips and utterances.

`allocate` shares by demand, with the divisor method of Webster / Sainte-Lague: tokens are handed out one at a time,
each to the item whose demand per token held is highest. Unlike rounding proportional shares (largest remainder), it
never takes a token from an item because the total grew: allocations only rise with the total.

`allocate_by_value` shares by measured curves of quality against tokens, so that the expected quality of all items
together is greatest. Each curve is read through its concave hull, where giving every token to the item that gains most
by it is optimal (Fox 1966, Management Science 13(3): discrete optimization via marginal analysis).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from tokenthrift.budget import BudgetError
from tokenthrift.quality import QualityCurve

__all__ = ["allocate", "allocate_by_value"]


def allocate(demand: Sequence[float], total: int, *, floors: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Shares `total` tokens in proportion to demand, within every item's floor and cap.

    Args:
        demand: How much each item is worth, at least 0: native tokens, seconds, saliency. An item of demand 0 gets
            tokens beyond its floor only once all others are at their caps.
        total: Tokens to share.
        floors: Fewest tokens of every item.
        caps: Most tokens of every item, usually a reducer's plan.

    Returns:
        One count per item, summing to `min(total, sum(caps))`. Ties go to the earlier item.

    Raises:
        BudgetError: A floor lies above its cap, or the floors sum to more than the total.
        ValueError: The sequences differ in length, or hold a negative or non-finite number.
    """
    _check(demand, total, floors, caps)
    shares = list(floors)
    queue = [(-worth / (2 * shares[i] + 1), i) for i, worth in enumerate(demand) if shares[i] < caps[i]]
    heapq.heapify(queue)
    for _ in range(min(total, sum(caps)) - sum(floors)):
        _, i = heapq.heappop(queue)
        shares[i] += 1
        if shares[i] < caps[i]:
            heapq.heappush(queue, (-demand[i] / (2 * shares[i] + 1), i))
    return shares


def allocate_by_value(
    curves: Sequence[QualityCurve],
    total: int,
    *,
    floors: Sequence[int],
    caps: Sequence[int],
    weights: Sequence[float] | None = None,
) -> list[int]:
    """Shares up to `total` tokens so that the sum of expected quality is greatest, within every floor and cap.

    Args:
        curves: Quality against tokens of each item.
        total: Most tokens to share. One that buys nothing is not spent.
        floors: Fewest tokens of every item.
        caps: Most tokens of every item, usually a reducer's plan.
        weights: How much the quality of each item counts, at least 0; 1 if not given.

    Returns:
        One count per item, summing to at most `total`; none falls when the total grows. Ties go to the earlier item.

    Raises:
        BudgetError: A floor lies above its cap, or the floors sum to more than the total.
        ValueError: The sequences differ in length, or hold a negative or non-finite number.
    """
    worth = [1.0] * len(curves) if weights is None else list(weights)
    if len(worth) != len(curves):
        raise ValueError(f"{len(curves)} curves and {len(worth)} weights")
    _check(worth, total, floors, caps)
    shares = list(floors)
    left = total - sum(floors)
    # Along a straight piece every token gains the same, so whole pieces are handed out, steepest first.
    pieces = []
    for i, curve in enumerate(curves):
        corners = curve.hull()
        for (start, low), (end, high) in zip(corners, corners[1:], strict=False):
            pieces.append((-worth[i] * (high - low) / (end - start), i, start, end))
    for gain, i, start, end in sorted(pieces):
        take = min(left, min(end, caps[i]) - max(start, shares[i]))
        if take > 0 and gain < 0:
            shares[i] += take
            left -= take
    return shares


def _check(demand: Sequence[float], total: int, floors: Sequence[int], caps: Sequence[int]) -> None:
    if not len(demand) == len(floors) == len(caps):
        raise ValueError(f"{len(demand)} demands, {len(floors)} floors and {len(caps)} caps")
    if not all(math.isfinite(value) and value >= 0 for value in (*demand, *floors, total)):
        raise ValueError("demands, floors and the total must be finite and at least 0")
    for i, (floor, cap) in enumerate(zip(floors, caps, strict=True)):
        if floor > cap:
            raise BudgetError(f"a floor of {floor} for item {i}", f"at most its cap of {cap}", f"a floor of {cap}")
    if sum(floors) > total:
        raise BudgetError(f"{total} tokens for {len(floors)} items", "at least the sum of the floors", sum(floors))
