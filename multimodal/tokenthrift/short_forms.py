"""The short forms of a budget, and what a person most likely meant who wrote another text.

Plain Python, like `budget`, which uses it: `64` tokens, `25%` of the native ones, `12.5/s`, `e0.05` for a target error.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Final

from tokenthrift.item_size import BudgetError

__all__ = ["SHORT_FORMS", "number_in", "read_short_form"]

SHORT_FORMS: Final = "64, 25%, 12.5/s or e0.05, joined by commas"
# A number, a share of something (1/2), and what follows: "12.5 tokens per second" has the unit "second".
_NUMBER = re.compile(
    r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?:/(?P<of>\d+))?\s*(?:t\w*)?\s*(?:/|per\b)?\s*(?P<unit>\S*)"
)


def read_short_form(part: str, text: str) -> tuple[str, int | float]:
    """The field of a budget that a short form sets, and its number.

    Args:
        part: one form, without spaces around it.
        text: the whole budget, for the error.

    Raises:
        BudgetError: It is none.
    """
    try:
        if part.endswith("%"):
            return "retention", float(Decimal(part[:-1]) / 100)
        if part.endswith("/s"):
            return "tokens_per_second", float(Decimal(part[:-2]))
        if part.startswith("e"):
            return "target_error", float(Decimal(part[1:]))
        return "max_tokens", int(part)
    except (ArithmeticError, ValueError):
        raise BudgetError(f"budget {text!r}", SHORT_FORMS, _nearest_short_form(part)) from None


def _nearest_short_form(part: str) -> str:
    """What a person most likely meant: a bare number up to 1 is a share, and a unit has many spellings."""
    found = _NUMBER.search(part)
    if found is None:
        return "100%"
    number, unit = float(found["number"]), found["unit"].lower()
    if found["of"]:
        number, unit = number / max(1, int(found["of"])) * 100, "%"
    if not (math.isfinite(number) and number > 0):
        return "1"
    if part.startswith("e"):
        return f"e{number:g}"
    if unit.startswith("s"):
        return f"{number:g}/s"
    if unit.startswith(("%", "percent")):
        return f"{min(number, 100):g}%"
    return f"{number * 100:g}%" if number <= 1 and "." in found["number"] else str(max(1, math.floor(number)))


def number_in(value: object, otherwise: float) -> float:
    """The finite number that a text of a wrong type holds, `25%` as 0.25."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return otherwise
    return number if math.isfinite(number) else otherwise
