"""Which reducer works on which modality, and what every item of a call may use.

One reducer and one budget for all; a mapping from modalities to reducers, to budgets, or both; a list with one budget
an item; a total that the items of every row share (`tokenthrift.allocation`); or all in one text, "tome:25%".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from tokenthrift.allocation import allocate
from tokenthrift.budget import BudgetError, BudgetLike, ItemSize, TokenBudget, budgets_for
from tokenthrift.reducers import REDUCERS, TokenReducer
from tokenthrift.registry import resolve, those_with

__all__ = ["Budgets", "Choice", "Reducers", "choose", "reducer_from"]

Reducers: TypeAlias = TokenReducer | str | Mapping[str, TokenReducer | str]
"""One reducer, or one for each modality; text names one, and its budget after a colon: "tome:25%"."""
Budgets: TypeAlias = BudgetLike | Mapping[str, BudgetLike] | Sequence[BudgetLike]
"""One budget, one for each modality, or a list with one for each item."""


_SHORT = {
    "tome": "merging",
    "norm": "norm-pruning",
    "pool": "average-pooling",
    "divprune": "max-min-diversity",
    "cdpruner": "conditional-diversity",
    "sparsevlm": "query-selection",
    "evs": "temporal-merging",
}
_COMMON = ("image", "video", "audio")


def reducer_from(name: str) -> TokenReducer:
    """The training-free reducer of that name, or of the short name of its method: "merging" is "tome".

    "vqtoken" is VQToken without weights.

    Raises:
        ValueError: There is none.
    """
    if name == "vqtoken":
        unweighted: TokenReducer = resolve(those_with("model")[name])()
        return unweighted
    build = REDUCERS.get(_SHORT.get(name, name))
    if build is None:
        raise ValueError(f"no reducer named {name!r}; there are {', '.join([*REDUCERS, *_SHORT, 'vqtoken'])}")
    return build()


@dataclass(frozen=True, slots=True)
class Choice:
    """Which reducer and which budget a modality has, and what all items of a row may use together."""

    reducers: Mapping[str, TokenReducer]
    budgets: Mapping[str, TokenBudget] | Sequence[TokenBudget]
    total: int | None

    def groups(self, modalities: Sequence[str]) -> list[tuple[TokenReducer, list[int]]]:
        """Each reducer with the indices of its items."""
        found: dict[int, tuple[TokenReducer, list[int]]] = {}
        for i, modality in enumerate(modalities):
            reducer = self.reducers[modality]
            found.setdefault(id(reducer), (reducer, []))[1].append(i)
        return list(found.values())

    def limits(self, modalities: Sequence[str], rows: Sequence[int], sizes: Sequence[ItemSize]) -> list[TokenBudget]:
        """The budget of every item of a call.

        Args:
            modalities: Of every item, in reading order.
            rows: Of every item; the items of a row share the total.
            sizes: What is known of every item.

        Raises:
            BudgetError: The total is smaller than the number of items of a row, or a budget cannot be honored.
            ValueError: There are not as many budgets as items.
        """
        if isinstance(self.budgets, Mapping):
            limits = [self.budgets[modality] for modality in modalities]
        else:
            limits = budgets_for(list(self.budgets), len(sizes))
        if self.total is None:
            return limits
        caps = [0] * len(sizes)
        for reducer, chosen in self.groups(modalities):
            for i, planned in zip(
                chosen, reducer.plan([sizes[i] for i in chosen], [limits[i] for i in chosen]), strict=True
            ):
                caps[i] = planned.cap
        for row in set(rows):
            chosen = [i for i in range(len(sizes)) if rows[i] == row and caps[i] > 0]
            shares = allocate(
                [float(sizes[i].require("native")) for i in chosen],
                self.total,
                floors=[min(max(limits[i].min_tokens, 1), caps[i]) for i in chosen],
                caps=[caps[i] for i in chosen],
            )
            for i, share in zip(chosen, shares, strict=True):
                limits[i] = replace(limits[i], max_tokens=share)
        return limits


def choose(
    reducer: Reducers, budget: Budgets, total: int | None, modalities: Collection[str] | None, known: Collection[str]
) -> Choice:
    """Reads the arguments of `attach`.

    Args:
        reducer: One for all modalities, or a mapping.
        budget: One for all items, a mapping from modalities, or a list with one for each item.
        total: Tokens that the items of a row share.
        modalities: What is reduced; None leaves it to the mapping, to the reducer, or to the model.
        known: What the model reads.

    Raises:
        BudgetError: A reducer does not honor a field of its budget, or the total is no count of tokens.
        ValueError: A modality is not one of the model.
    """
    if isinstance(reducer, str):
        name, colon, text = (part.strip() for part in reducer.partition(":"))
        if colon and budget is not None:
            raise ValueError(f"{reducer!r} with budget={budget!r} names a budget twice")
        reducer, budget = reducer_from(name), text if colon else budget
    by_modality: Mapping[str, Any] | None = None
    if isinstance(budget, Mapping) and budget and not set(budget).difference({*known, *_COMMON}):
        by_modality = budget
    mappings = [value for value in (reducer, by_modality) if isinstance(value, Mapping)]
    if modalities is not None:
        named = set(modalities)
    elif mappings:
        named = set(mappings[0])
    else:
        named = set(getattr(reducer, "modalities", known)).intersection(known)
    for names in (named, *map(set, mappings)):
        if unknown := names.difference(known):
            raise ValueError(
                f"no modalities that can be reduced: {', '.join(sorted(unknown))}; this model reads {', '.join(known)}"
            )
        if names != named:
            raise ValueError(
                f"{', '.join(sorted(named))} is reduced, but reducers or budgets are for {', '.join(sorted(names))}"
            )
    chosen = [modality for modality in known if modality in named]
    reducers: dict[str, TokenReducer] = {}
    for modality in chosen:
        one = reducer[modality] if isinstance(reducer, Mapping) else reducer
        reducers[modality] = reducer_from(one) if isinstance(one, str) else one
    if total is not None and total < 1:
        raise BudgetError(f"a total of {total!r}", "a number of tokens from 1", 1)
    budgets: Any
    if isinstance(budget, list | tuple):
        budgets = [TokenBudget.parse(each) for each in budget]
        checks = [(each, limit) for limit in budgets for each in reducers.values()]
    else:
        parsed: Any = budget
        budgets = {m: TokenBudget.parse(parsed if by_modality is None else by_modality[m]) for m in chosen}
        checks = [(reducers[m], budgets[m]) for m in chosen]
    for each, limit in checks:
        each.support.check(limit)
    return Choice(reducers, budgets, total)
