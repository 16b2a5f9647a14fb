"""One budget over many items: how a context window is shared between pictures, clips and utterances.

Divisor method of Webster / Sainte-Lague: tokens are handed out one at a time, each to the item whose demand per token
held is highest. Unlike rounding proportional shares (largest remainder), it never takes a token from an item because
the total grew: allocations only rise with the total.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from tokenthrift.budget import BudgetError

__all__ = ["allocate"]


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
    if not len(demand) == len(floors) == len(caps):
        raise ValueError(f"{len(demand)} demands, {len(floors)} floors and {len(caps)} caps")
    if not all(math.isfinite(value) and value >= 0 for value in (*demand, *floors, total)):
        raise ValueError("demands, floors and the total must be finite and at least 0")
    for i, (floor, cap) in enumerate(zip(floors, caps, strict=True)):
        if floor > cap:
            raise BudgetError(f"a floor of {floor} for item {i}", f"at most its cap of {cap}", f"a floor of {cap}")
    if sum(floors) > total:
        raise BudgetError(f"{total} tokens for {len(floors)} items", "at least the sum of the floors", sum(floors))
    shares = list(floors)
    queue = [(-worth / (2 * shares[i] + 1), i) for i, worth in enumerate(demand) if shares[i] < caps[i]]
    heapq.heapify(queue)
    for _ in range(min(total, sum(caps)) - sum(floors)):
        _, i = heapq.heappop(queue)
        shares[i] += 1
        if shares[i] < caps[i]:
            heapq.heappush(queue, (-demand[i] / (2 * shares[i] + 1), i))
    return shares
