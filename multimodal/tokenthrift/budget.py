"""Token budgets: what an item may cost, what it did cost, and what a system can honor.

Plain Python on purpose: a planner, a command line or a scheduler counts an input's tokens without importing torch.

Words: *native* is what the encoder makes of an item, *cap* the most it may keep, *used* what it kept, *retention* the
share used / native, a *round* one forward pass of an iterative decoder.

Published projects each have a word of their own (pixels, pruning rate, dominant + contextual, downsample ratio), some
with opposite senses, some silently ignored or overruled by a floor (vLLM issue 48733; frame floor of qwen-vl-utils).
Here every ceiling that is set applies, the lowest wins, rounding is always down, and what cannot be honored raises.

A budget is written in one of four ways, everywhere the same: as a short form (`64`, `25%`, `12.5/s`, `e0.05`, or
several joined by commas: `64,e0.05`), as a number of tokens, as a mapping (`{"max_tokens": 64}`), or as the dataclass.
None sets no ceiling. Annotate a parameter as `BudgetLike` and jsonargparse accepts all of them from flags, YAML and
JSON; `TokenBudget.parse` reads whichever came.

Every reducer and every system is a `TokenPlanner`: `support` says what it honors, and `plan(items, budget)` what
items of a known `ItemSize` will use, before any weight is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Literal, Protocol, Self, TypeAlias

from tokenthrift.item_size import BudgetError, ItemSize, NativeCost, SizeLike, TokenUsage, sizes_of
from tokenthrift.short_forms import SHORT_FORMS, number_in, read_short_form

__all__ = [
    "BudgetError",
    "BudgetLike",
    "BudgetSupport",
    "DecodeBudget",
    "DecodeLike",
    "ItemSize",
    "NativeCost",
    "SizeLike",
    "TokenBudget",
    "TokenPlanner",
    "TokenUsage",
    "budgets_for",
    "sizes_of",
]

_CEILINGS = ("max_tokens", "retention", "tokens_per_second", "target_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """Ceilings for ONE item; all that are set apply and the lowest wins."""

    max_tokens: int | None = None
    """Most tokens an item may keep."""
    retention: float | None = None
    """Largest share of the native tokens an item may keep, above 0 and at most 1."""
    tokens_per_second: float | None = None
    """Most tokens an item may keep per second of its duration."""
    target_error: float | None = None
    """Reconstruction error at which an adaptive system may stop earlier; never raises the cap."""
    min_tokens: int = 1
    """Fewest tokens an item is worth keeping; a floor above the cap is an error, never a silent raise."""

    def __post_init__(self) -> None:
        _check_int(self, "max_tokens", 1)
        _check_int(self, "min_tokens", 0)
        _check_float(self, "retention", at_most=1.0)
        _check_float(self, "tokens_per_second")
        _check_float(self, "target_error", zero=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise BudgetError(
                f"min_tokens={self.min_tokens} with max_tokens={self.max_tokens}",
                "a floor at or below the cap",
                f"min_tokens={self.max_tokens}",
            )

    def cap(self, native: int, seconds: float | None = None) -> int:
        """Most tokens an item of `native` tokens may keep.

        An item that has fewer than `min_tokens` native tokens has all of them as its floor: nothing can be added to it.

        Args:
            native: Tokens the encoder makes of the item.
            seconds: The item's duration, which `tokens_per_second` needs.

        Raises:
            BudgetError: The ceilings leave fewer than `min_tokens`, or the duration is needed and not given.
        """
        if native < 0:
            raise ValueError(f"native is a count of tokens, not {native}")
        cap = native
        if self.max_tokens is not None:
            cap = min(cap, self.max_tokens)
        if self.retention is not None:
            cap = min(cap, math.floor(_exact(self.retention) * native))
        if self.tokens_per_second is not None:
            if seconds is None:
                raise BudgetError(
                    f"tokens_per_second={self.tokens_per_second} for an item of unknown duration",
                    "tokens_per_second where the duration is known",
                    "max_tokens or retention",
                )
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a duration is a finite number of seconds, not {seconds}")
            cap = min(cap, math.floor(_exact(self.tokens_per_second) * _exact(float(seconds))))
        return _above_floor(cap, native, self)

    @classmethod
    def parse(cls, value: BudgetLike) -> Self:
        """Read a budget from a short form, a number of tokens, a mapping, a JSON object, a budget, or None.

        None and `100%` take nothing away.

        Raises:
            BudgetError: The value is not a budget, or a text names one ceiling twice.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            kind = type(value).__name__
            nearest = "give it as decode=" if kind == "DecodeBudget" else 64
            raise BudgetError(f"a budget of type {kind}", f"{SHORT_FORMS}, a mapping or a TokenBudget", nearest)
        text = str(value).strip()
        if text.startswith("{"):
            try:
                return cls.from_dict(json.loads(text))
            except json.JSONDecodeError as error:
                raise BudgetError(f"budget {text!r}", f"a JSON object ({error})", '{"max_tokens": 64}') from None
        found: dict[str, int | float] = {}
        for part in text.split(","):
            name, number = read_short_form(part.strip(), text)
            if name in found:
                raise BudgetError(f"budget {text!r} sets {name} twice", "each ceiling once", part.strip())
            found[name] = number
        return cls.from_dict(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML keep, with only the fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. Raises BudgetError on a key that is not a field."""
        return cls(**_known(cls, data))


BudgetLike: TypeAlias = TokenBudget | str | int | Mapping[str, Any] | None
"""What a parameter that takes a budget is annotated with. The order matters to jsonargparse: fields before text."""


def budgets_for(budget: BudgetLike | Sequence[BudgetLike], count: int) -> list[TokenBudget]:
    """The budget of every one of `count` items.

    Args:
        budget: One for all of them, or a list or tuple with one for each.
        count: How many items there are.

    Raises:
        BudgetError: One of them is not a budget.
        ValueError: A list has another length than there are items.
    """
    if isinstance(budget, list | tuple):
        if len(budget) != count:
            raise ValueError(f"{count} items but {len(budget)} budgets; give one for all, or one for each")
        return [TokenBudget.parse(each) for each in budget]
    return [TokenBudget.parse(budget)] * count  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBudget:
    """Ceilings and wishes for one decoded text of an iterative (masked diffusion) decoder."""

    max_new_tokens: int | None = None
    """Most tokens to write; None is the model's own."""
    max_rounds: int | None = None
    """Most forward passes of the denoiser; None is the model's own."""
    confidence_threshold: float | None = None
    """Probability from which a token is committed in a round, above 0 and at most 1; None is the model's own."""
    certify: Literal["ar"] | None = None
    """"ar" writes exactly the greedy left-to-right text of the same model, sooner, where it has one; None is the
    model's own."""
    hotwords: tuple[str, ...] = ()
    """Words that are likely; they gain where the model is still undecided."""

    def __post_init__(self) -> None:
        if self.certify not in (None, "ar"):
            raise BudgetError(f"certify={self.certify!r}", "'ar'", "certify='ar'")
        words: Any = self.hotwords
        if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
            raise BudgetError(f"hotwords={words!r}", "a list of words", "hotwords=('word',)")
        object.__setattr__(self, "hotwords", tuple(words))
        _check_int(self, "max_new_tokens", 1)
        _check_int(self, "max_rounds", 1)
        _check_float(self, "confidence_threshold", at_most=1.0)

    @classmethod
    def parse(cls, value: DecodeLike) -> Self:
        """Read a budget from a mapping, a budget, or None, which leaves all to the model.

        Raises:
            BudgetError: The value is none of these, or a key is not a field.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise BudgetError(
            f"a {type(value).__name__} where a DecodeBudget belongs", "a DecodeBudget or a mapping", '{"max_rounds": 4}'
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON and YAML keep."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of `to_dict`. Raises BudgetError on a key that is not a field."""
        return cls(**_known(cls, data))


DecodeLike: TypeAlias = DecodeBudget | Mapping[str, Any] | None
"""What a parameter that takes a decoding budget is annotated with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSupport:
    """What a system can honor. Constant per model, so that a plan needs neither weights nor a device."""

    fields: frozenset[str]
    """Ceilings of TokenBudget that are honored; any other that is set raises. The floor is always honored."""
    max_tokens: int | None = None
    """Most tokens the system can keep for one item; None where nothing but the input limits it."""
    choices: tuple[int, ...] | None = None
    """Counts below native that the system can keep, ascending; None for any. Caps are snapped down to them."""
    rates: tuple[float, ...] | None = None
    """Tokens a second that the system can keep, one of them for each item; None where it has no rates of its own."""
    nested: bool = False
    """n tokens are the first n of m tokens."""
    adaptive: bool = False
    """Content decides how many are used, so that a plan is a bound and not the count."""
    training_free: bool = False
    """Needs no trained weights."""

    def __post_init__(self) -> None:
        if unknown := self.fields.difference(_CEILINGS):
            raise ValueError(f"not ceilings of TokenBudget: {', '.join(sorted(unknown))}")
        if self.choices is not None and (not self.choices or list(self.choices) != sorted(set(self.choices))):
            raise ValueError(f"choices must be ascending and distinct, not {self.choices}")

    def check(self, budget: TokenBudget) -> None:
        """Raise BudgetError where the budget sets a ceiling that the system does not honor."""
        ignored = [name for name in _CEILINGS if getattr(budget, name) is not None and name not in self.fields]
        if ignored:
            name = ignored[0]
            honored = ", ".join(field for field in _CEILINGS if field in self.fields)
            allowed = f"the fields {honored}" if honored else "no ceiling: this system has one count for each input"
            raise BudgetError(f"{name}={getattr(budget, name)}", allowed, f"no {name}")

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """The plan of a system that has no rule of its own: every item keeps as much as its budget lets it.

        Keeping all of native is always possible, whatever `choices` says.

        Args:
            items: Their native tokens; and their seconds, which `tokens_per_second` needs.
            budget: Ceilings for each of them, or a list with one budget for each.

        Raises:
            BudgetError: A ceiling is not honored, no choice lies between the floor and the ceilings, or what an item
                needs is not known.
        """
        sizes = sizes_of(items)
        usage = []
        for item, limit in zip(sizes, budgets_for(budget, len(sizes)), strict=True):
            self.check(limit)
            native = item.require("native")
            cap = self._snap(limit.cap(native, item.seconds), native, limit)
            usage.append(TokenUsage(native=native, cap=cap, used=cap))
        return tuple(usage)

    def _snap(self, cap: int, native: int, budget: TokenBudget) -> int:
        cap = cap if self.max_tokens is None else min(cap, self.max_tokens)
        if self.choices is not None and cap < native:
            legal = [choice for choice in self.choices if choice <= cap]
            if not legal:
                raise BudgetError(
                    f"at most {cap} of {native} tokens", f"one of {list(self.choices)}", min(self.choices[0], native)
                )
            cap = legal[-1]
        return _above_floor(cap, native, budget)


class TokenPlanner(Protocol):
    """What every reducer and every system can say before it runs."""

    @property
    def support(self) -> BudgetSupport:
        """What is honored."""

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """What every item will use: exactly, or at most where content decides. Needs neither weights nor a device.

        Args:
            items: What is known of every item; a number stands for its native tokens.
            budget: Ceilings for each item, or a list with one budget for each.

        Raises:
            BudgetError: The budget cannot be honored, or something that the count needs is not known of an item.
        """


def _above_floor(cap: int, native: int, budget: TokenBudget) -> int:
    floor = min(budget.min_tokens, native)
    if cap < floor:
        raise BudgetError(
            f"{budget.to_dict()} leaves {cap} of {native} tokens",
            f"at least min_tokens={budget.min_tokens}",
            f"min_tokens={cap}",
        )
    return cap


def _exact(number: float) -> Fraction:
    """The decimal number a person wrote: 0.29 of 100 is 29, which binary floating point makes 28.999..."""
    return Fraction(repr(number))


def _known(cls: type[TokenBudget] | type[DecodeBudget], data: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(cls)]
    for key in data:
        if key not in names:
            nearest = next(iter(get_close_matches(str(key), names, 1)), names[0])
            raise BudgetError(f"{cls.__name__} with {key!r}", f"the keys {', '.join(names)}", nearest)
    return dict(data)


def _check_int(budget: TokenBudget | DecodeBudget, name: str, least: int) -> None:
    value = getattr(budget, name)
    if value is None and name != "min_tokens":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        nearest = max(least, math.floor(number_in(value, least)))
        raise BudgetError(f"{name}={value!r}", f"an integer from {least}", f"{name}={nearest}")


def _check_float(
    budget: TokenBudget | DecodeBudget, name: str, *, at_most: float = math.inf, zero: bool = False
) -> None:
    value = getattr(budget, name)
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value > at_most or not (value > 0 or (zero and value == 0)):
        low, high = "from 0" if zero else "above 0", "" if at_most == math.inf else f" up to {at_most:g}"
        nearest = number_in(value, 1)
        if not (0 < nearest <= at_most):
            nearest = 0 if zero else 1
        raise BudgetError(f"{name}={value!r}", f"a finite number {low}{high}", f"{name}={nearest:g}")
    object.__setattr__(budget, name, float(value))
