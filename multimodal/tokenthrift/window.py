"""One context window over many media: what every item of a prompt gets, before anything runs.

    from tokenthrift.window import Window, WindowItem
    from tokenthrift.reducers import BipartiteMerging, Uniform
    plan = Window(1024, [
        WindowItem.text("the question", 12),
        WindowItem.of(BipartiteMerging(), 729, kind="image"),
        WindowItem.of(Uniform(), 6272, kind="video", weight=2),
    ]).plan()
    plan.used, plan.budgets     # at most 1024, and the budget to run each item with

Serving systems cut a prompt at its end or refuse it; papers on token reduction give each picture the same share. Here
text is kept whole, every planner's own rules hold (rates, fixed choices, floors), and what one item cannot use goes to
the others. Plain Python: planners need no weights, so neither does a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from tokenthrift.allocation import allocate, allocate_by_value
from tokenthrift.budget import BudgetError, BudgetLike, SizeLike, TokenBudget, TokenPlanner, TokenUsage
from tokenthrift.quality import QualityCurve

__all__ = ["PlannedItem", "Split", "Window", "WindowItem", "WindowPlan"]

Split: TypeAlias = Literal["demand", "value", "equal"]
"""How tokens are shared: by native tokens, by measured quality, or alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowItem:
    """One part of a prompt."""

    cost: Callable[[TokenBudget], TokenUsage]
    """What the item uses under a budget; raises BudgetError where it cannot keep to it."""
    name: str = ""
    """How tables call it."""
    kind: str = "text"
    """text, image, video, audio, talking."""
    budget: TokenBudget = field(default_factory=TokenBudget)
    """Ceilings of its own, within the window."""
    weight: float = 1.0
    """How much it counts beside the others, from 0."""
    curve: QualityCurve | None = None
    """Its quality against tokens, for a split by value."""
    fixed: bool = False
    """Whether it costs what it costs: text, and systems that honor no `max_tokens`."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"{self.name or self.kind}: a weight is a finite number from 0, not {self.weight}")

    @classmethod
    def text(cls, name: str, tokens: int) -> WindowItem:
        """Text of so many tokens, which is kept whole."""
        usage = TokenUsage(native=tokens, cap=tokens, used=tokens)
        return cls(cost=lambda budget: usage, name=name, fixed=True)

    @classmethod
    def of(
        cls,
        planner: TokenPlanner,
        size: SizeLike,
        *,
        kind: str,
        name: str = "",
        budget: BudgetLike = None,
        weight: float = 1.0,
        curve: QualityCurve | None = None,
    ) -> WindowItem:
        """An item that a reducer or a system plans.

        Args:
            planner: Of its tokens.
            size: What is known of it; a number is that of its native tokens.
            kind: image, video, audio or talking.
            name: How tables call it.
            budget: Ceilings of its own.
            weight: How much it counts beside the others.
            curve: Its quality against tokens.
        """
        return cls(
            cost=lambda limit: planner.plan([size], limit)[0],
            name=name,
            kind=kind,
            budget=TokenBudget.parse(budget),
            weight=weight,
            curve=curve,
            fixed="max_tokens" not in planner.support.fields,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedItem:
    """What an item gets."""

    item: WindowItem
    budget: TokenBudget
    """To run it with."""
    usage: TokenUsage
    """Native tokens, and at most how many it will use under that budget."""

    @property
    def expected(self) -> float | None:
        """Quality by the item's curve; None without one."""
        return None if self.item.curve is None else self.item.curve.at(self.usage.used)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """A prompt within its window."""

    total: int
    reserved: int
    """Kept free for the answer."""
    split: Split
    items: tuple[PlannedItem, ...]

    @property
    def native(self) -> int:
        """Tokens of the whole prompt without any reduction."""
        return sum(planned.usage.native for planned in self.items)

    @property
    def used(self) -> int:
        """Tokens of the prompt at most: never more than `total - reserved`."""
        return sum(planned.usage.used for planned in self.items)

    @property
    def budgets(self) -> list[TokenBudget]:
        """The budget of every item, in order."""
        return [planned.budget for planned in self.items]

    def to_plain(self) -> dict[str, Any]:
        """Plain data, as `tokenthrift plan PROMPT.yaml --json` prints it."""
        rows = []
        for planned in self.items:
            row: dict[str, Any] = {"name": planned.item.name, "kind": planned.item.kind}
            row |= {"native": planned.usage.native, "tokens": planned.usage.used}
            if planned.budget.to_dict():
                row["budget"] = planned.budget.to_dict()
            if planned.expected is not None:
                row["expected_quality"] = round(planned.expected, 6)
            rows.append(row)
        whole = {"context": self.total, "reserved": self.reserved, "split": self.split}
        return {**whole, "native": self.native, "tokens": self.used, "items": rows}


class Window:
    """A context window and the prompt that has to fit into it.

    Args:
        total: Tokens of the window.
        items: Parts of the prompt, in order.
        split: By "demand" every item gets tokens in proportion to its native ones times its weight; by "value" those
            that add most to the expected quality, weighted; "equal" as many as the others, times its weight.
        reserve: Tokens kept free for the answer.

    Raises:
        ValueError: A total or a reserve below 0, a split that does not exist, or one by value with an item that has no
            curve.
    """

    def __init__(self, total: int, items: Sequence[WindowItem], *, split: Split = "demand", reserve: int = 0) -> None:
        if total < 0 or reserve < 0:
            raise ValueError(f"a window of {total} tokens with {reserve} kept free; both are at least 0")
        if split not in get_args(Split):
            raise ValueError(f"split {split!r}; known: {', '.join(get_args(Split))}")
        if split == "value":
            for i, item in enumerate(items):
                if not item.fixed and item.curve is None:
                    raise ValueError(
                        f"{item.name or f'item {i}'} ({item.kind}) has no curve of quality against tokens: measure "
                        "its model with `tokenthrift evaluate`, or split by demand"
                    )
        self.total, self.items, self.split, self.reserve = total, tuple(items), split, reserve

    def plan(self) -> WindowPlan:
        """What every item gets. Needs neither weights nor a device.

        Raises:
            BudgetError: Text and the least that every item can be reduced to do not fit.
        """
        costs = [_Cost(item) for item in self.items]
        room = self.total - self.reserve
        floors = [cost.least for cost in costs]
        if sum(floors) > room:
            held = f", {self.reserve} of them kept free" if self.reserve else ""
            rows = ", ".join(f"{c.item.name or c.item.kind} {c.least}" for c in costs)
            raise BudgetError(
                f"a window of {self.total} tokens{held}",
                f"the least that its items need: {rows}",
                sum(floors) + self.reserve,
            )
        caps, natives = [cost.most for cost in costs], [cost.whole.native for cost in costs]
        while True:
            shares = self._shares(room, natives, floors, caps)
            found = [cost.fit(share) for cost, share in zip(costs, shares, strict=True)]
            settled = [usage.used for _, usage in found]
            if settled == shares:
                break
            # An item of a few fixed sizes leaves a rest, which goes to the others.
            caps = [used if used < share else cap for used, share, cap in zip(settled, shares, caps, strict=True)]
        planned = tuple(
            PlannedItem(item=item, budget=budget, usage=usage)
            for item, (budget, usage) in zip(self.items, found, strict=True)
        )
        return WindowPlan(total=self.total, reserved=self.reserve, split=self.split, items=planned)

    def _shares(self, room: int, natives: Sequence[int], floors: Sequence[int], caps: Sequence[int]) -> list[int]:
        weights = [item.weight for item in self.items]
        if self.split == "value":
            flat = QualityCurve(tokens=(0,), quality=(0.0,))
            curves = [item.curve or flat for item in self.items]
            return allocate_by_value(curves, room, floors=floors, caps=caps, weights=weights)
        demand = weights
        if self.split == "demand":
            demand = [weight * native for weight, native in zip(weights, natives, strict=True)]
        return allocate(demand, room, floors=floors, caps=caps)


class _Cost:
    """What an item can use: the least, the most, and the most within a share.

    `max_tokens` of a budget is found by bisection, because it need not be what is used: a rate gives certain counts
    only, and a long recording keeps to its budget window by window.
    """

    def __init__(self, item: WindowItem) -> None:
        self.item = item
        self._known: dict[int, TokenUsage | BudgetError] = {}
        self.whole = item.cost(item.budget)
        self.most = self.least = self.whole.used
        self._lowest = own = item.budget.max_tokens or max(self.whole.cap, 1)
        if item.fixed or not self.whole.used:
            return
        low, self._highest = 1, own
        while low < own:
            middle = (low + own) // 2
            if isinstance(self._at(middle), BudgetError):
                low = middle + 1
            else:
                own = middle
        self._lowest = low
        found = self._at(low)
        if isinstance(found, BudgetError):
            raise found
        self.least = found.used

    def fit(self, share: int) -> tuple[TokenBudget, TokenUsage]:
        """The budget that uses most of a share, and what it uses; a share is at least `least`."""
        if share >= self.most:
            return self.item.budget, self.whole
        low, high = self._lowest, max(self._lowest, min(self._highest, share))
        while low < high:
            middle = (low + high + 1) // 2
            found = self._at(middle)
            if not isinstance(found, BudgetError) and found.used <= share:
                low = middle
            else:
                high = middle - 1
        found = self._at(low)
        assert isinstance(found, TokenUsage)
        return replace(self.item.budget, max_tokens=low), found

    def _at(self, tokens: int) -> TokenUsage | BudgetError:
        if tokens not in self._known:
            try:
                self._known[tokens] = self.item.cost(replace(self.item.budget, max_tokens=tokens))
            except BudgetError as error:
                self._known[tokens] = error
        return self._known[tokens]
