"""One window over many media: nothing is over the total, every planner's rules hold, and rests are not lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.budget import BudgetError, BudgetSupport, SizeLike, TokenBudget, TokenUsage, sizes_of
from tokenthrift.quality import QualityCurve
from tokenthrift.reducers import BipartiteMerging, Stacking, Uniform
from tokenthrift.window import Split, Window, WindowItem


class Rates:
    """A planner of a few counts: native divided by 2, 4 or 16."""

    support = BudgetSupport(fields=frozenset({"max_tokens", "retention"}))

    def plan(self, items: Sequence[SizeLike], budget: Any = None) -> tuple[TokenUsage, ...]:
        limit, usage = TokenBudget.parse(budget), []
        for item in sizes_of(items):
            native = item.require("native")
            counts = [-(-native // rate) for rate in (2, 4, 16)]
            fitting = [n for n in counts if n <= limit.cap(native)]
            if not fitting:
                raise BudgetError(str(limit), f"one of {counts}", counts[-1])
            usage.append(TokenUsage(native=native, cap=max(fitting), used=max(fitting)))
        return tuple(usage)


class Fixed:
    """A planner that honors no ceiling."""

    support = BudgetSupport(fields=frozenset())

    def plan(self, items: Sequence[SizeLike], budget: Any = None) -> tuple[TokenUsage, ...]:
        self.support.check(TokenBudget.parse(budget))
        return tuple(
            TokenUsage(native=4 * n, cap=n, used=n) for n in (item.require("native") for item in sizes_of(items))
        )


CURVE = QualityCurve(tokens=(1, 8, 64), quality=(0.3, 0.8, 0.9))
PLANNERS = st.sampled_from([Uniform(), Rates(), Stacking(8), Fixed()])
ITEMS = st.lists(
    st.tuples(PLANNERS, st.integers(16, 400), st.sampled_from([None, "50%", 90]), st.sampled_from([0.5, 1, 2])),
    min_size=1,
    max_size=5,
)


@given(ITEMS, st.integers(0, 300), st.sampled_from(["demand", "value", "equal"]))
def test_a_plan_keeps_to_the_window_and_to_every_planner(
    rows: list[tuple[Any, int, Any, float]], spare: int, split: Split
) -> None:
    items = [WindowItem.text("question", 7)]
    rows = [(p, native, None if isinstance(p, Fixed) else budget, weight) for p, native, budget, weight in rows]
    for planner, native, budget, weight in rows:
        items.append(WindowItem.of(planner, native, kind="image", budget=budget, weight=weight, curve=CURVE))
    with pytest.raises(BudgetError, match="least that its items need") as refused:
        Window(0, items, split=split).plan()
    least = refused.value.nearest
    assert isinstance(least, int)
    total = least + spare
    plan = Window(total, items, split=split).plan()
    assert plan.used <= total
    for (planner, native, budget, _), planned in zip(rows, plan.items[1:], strict=True):
        assert planner.plan([native], planned.budget) == (planned.usage,)
        assert planned.usage.used <= TokenBudget.parse(budget).cap(native)
    with pytest.raises(BudgetError):
        Window(least - 1, items, split=split).plan()


def test_the_prompt_that_was_split_by_hand() -> None:
    natives = [729, 729, 2916, 6272, 3136, 1500]
    items = [WindowItem.of(Uniform(), n, kind="image") for n in natives]
    plan = Window(1024, items).plan()
    assert [planned.usage.used for planned in plan.items] == [49, 49, 195, 420, 210, 101]
    assert plan.used == 1024
    assert plan.native == sum(natives)
    assert plan.budgets[0] == TokenBudget(max_tokens=49)


def test_what_a_rate_leaves_over_goes_to_the_others() -> None:
    items = [WindowItem.of(Rates(), 100, kind="audio"), WindowItem.of(Uniform(), 100, kind="image")]
    plan = Window(80, items).plan()
    # Half of 80 is 40, of which rates use 25; the picture gets the other 55.
    assert [planned.usage.used for planned in plan.items] == [25, 55]


def test_a_recording_of_several_windows_counts_them_all() -> None:
    class Parts:
        support = BudgetSupport(fields=frozenset({"max_tokens"}))

        def plan(self, items: Sequence[SizeLike], budget: Any = None) -> tuple[TokenUsage, ...]:
            each = TokenBudget.parse(budget).cap(50)  # three windows of 50 tokens, each under the budget
            return (TokenUsage(native=150, cap=3 * each, used=3 * each),)

    (planned,) = Window(100, [WindowItem.of(Parts(), 150, kind="audio")]).plan().items
    assert planned.usage.used == 99
    assert planned.budget == TokenBudget(max_tokens=33)


def test_value_gives_tokens_where_they_buy_most_and_weights_count() -> None:
    steep = QualityCurve(tokens=(0, 4), quality=(0.1, 0.9))
    slow = QualityCurve(tokens=(0, 64), quality=(0.1, 0.9))
    items = [
        WindowItem.of(Uniform(), 64, kind="image", curve=slow, name="a"),
        WindowItem.of(Uniform(), 64, kind="audio", curve=steep, name="b"),
    ]
    plan = Window(20, items, split="value").plan()
    assert [planned.usage.used for planned in plan.items] == [16, 4]
    assert [planned.expected for planned in plan.items] == [pytest.approx(0.3), 0.9]
    assert Window(20, items, split="equal").plan().items[1].usage.used == 10
    heavy = [replace(items[0], weight=100), items[1]]
    # The floor of one token stays.
    assert [p.usage.used for p in Window(20, heavy, split="value").plan().items] == [19, 1]
    with pytest.raises(ValueError, match=r"c \(image\) has no curve"):
        Window(20, [WindowItem.of(Uniform(), 9, kind="image", name="c")], split="value")


def test_text_is_kept_whole_and_an_answer_has_room() -> None:
    items = [WindowItem.text("q", 30), WindowItem.of(BipartiteMerging(), 1000, kind="image")]
    plan = Window(100, items, reserve=20).plan()
    assert [planned.usage.used for planned in plan.items] == [30, 50]
    with pytest.raises(BudgetError, match="nearest legal value: 51"):
        Window(50, items, reserve=20).plan()
    assert plan.to_plain() == {
        "context": 100,
        "reserved": 20,
        "split": "demand",
        "native": 1030,
        "tokens": 80,
        "items": [
            {"name": "q", "kind": "text", "native": 30, "tokens": 30},
            {"name": "", "kind": "image", "native": 1000, "tokens": 50, "budget": {"max_tokens": 50}},
        ],
    }


def test_what_is_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Window(-1, [])
    with pytest.raises(ValueError, match="known: demand, value, equal"):
        Window(1, [], split="fair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is a finite number"):
        WindowItem.of(Uniform(), 3, kind="image", weight=-1)
    assert Window(0, []).plan().used == 0


def test_planning_needs_no_torch() -> None:
    code = "import sys, tokenthrift.window; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    path = ":".join(part for part in sys.path if part)
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})
