"""Laws of `allocate`: within floors and caps, sums exactly, proportional, and more never means less."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.allocation import allocate
from tokenthrift.budget import BudgetError
from tokenthrift.reducers import Uniform

ITEMS = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(0, 8), st.integers(0, 30)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=8,
)


def share(items: list[tuple[float, int, int]], total: int) -> list[int]:
    return allocate([i[0] for i in items], total, floors=[i[1] for i in items], caps=[i[2] for i in items])


@given(ITEMS, st.integers(0, 300))
def test_shares_are_within_bounds_and_sum_exactly(items: list[tuple[float, int, int]], spare: int) -> None:
    total = sum(floor for _, floor, _ in items) + spare
    shares = share(items, total)
    assert all(floor <= n <= cap for n, (_, floor, cap) in zip(shares, items, strict=True))
    assert sum(shares) == min(total, sum(cap for _, _, cap in items))
    assert all(n <= m for n, m in zip(shares, share(items, total + 1), strict=True))


@given(ITEMS, st.integers(0, 100))
def test_more_demand_never_gets_less(items: list[tuple[float, int, int]], total: int) -> None:
    alike = [(demand, 0, 30) for demand, _, _ in items]
    ranked = sorted(zip(share(alike, total), alike, strict=True), key=lambda pair: (pair[1][0], pair[0]))
    assert [n for n, _ in ranked] == sorted(n for n, _ in ranked)


def test_proportional_with_ties_to_the_earlier() -> None:
    assert allocate([100, 300, 600], 50, floors=[0, 0, 0], caps=[99, 99, 99]) == [5, 15, 30]
    assert allocate([1, 1, 1], 7, floors=[0, 0, 0], caps=[9, 9, 9]) == [3, 2, 2]
    assert allocate([0, 5, 0], 7, floors=[0, 0, 0], caps=[9, 4, 9]) == [3, 4, 0]
    assert allocate([], 7, floors=[], caps=[]) == []


def test_what_cannot_be_shared_raises() -> None:
    with pytest.raises(BudgetError, match="nearest legal value: 5"):
        allocate([1, 1], 4, floors=[2, 3], caps=[9, 9])
    with pytest.raises(BudgetError, match="item 1"):
        allocate([1, 1], 9, floors=[0, 5], caps=[9, 4])
    with pytest.raises(ValueError, match="2 demands, 1 floors"):
        allocate([1, 1], 9, floors=[0], caps=[9, 4])
    for demand in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            allocate([demand], 9, floors=[0], caps=[9])


def test_one_window_over_a_planned_batch() -> None:
    native = [400, 40, 1]
    caps = [usage.cap for usage in Uniform().plan(native, 64)]
    shares = allocate(native, 80, floors=[1, 1, 1], caps=caps)
    assert sum(shares) == 80
    assert all(share <= cap for share, cap in zip(shares, caps, strict=True))
