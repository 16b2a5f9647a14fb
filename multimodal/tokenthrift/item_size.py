"""What is known of an item before anything runs, what it used, and the error that a budget raises.

Plain Python, like `budget`, which is where users import these names from. Published projects count tokens inside the
model's forward pass; here a size is enough, so that a planner counts the tokens of files by their headers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

__all__ = ["BudgetError", "ItemSize", "NativeCost", "SizeLike", "TokenUsage", "sizes_of"]


class BudgetError(ValueError):
    """A budget that cannot be honored: what was requested, what is allowed, and the nearest legal value."""

    def __init__(self, requested: str, allowed: str, nearest: object) -> None:
        super().__init__(requested, allowed, nearest)
        self.requested, self.allowed, self.nearest = requested, allowed, nearest

    def __str__(self) -> str:
        return f"{self.requested}; allowed: {self.allowed}; nearest legal value: {self.nearest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemSize:
    """What is known of one item before anything runs; what is not known stays None.

    A picture has a height and a width, a clip frames besides, a recording seconds, a talking video seconds of sound and
    frames of picture. What an encoder has already run over has native tokens.
    """

    native: int | None = None
    """Tokens before any reduction, where they are known."""
    seconds: float | None = None
    """Duration of its sound, or of the whole item."""
    frames: int | None = None
    """Frames of video."""
    height: int | None = None
    """Rows: of pixels, or of visual tokens where a system counts these."""
    width: int | None = None
    """Columns, likewise."""

    def __post_init__(self) -> None:
        for name in ("native", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name} is a whole number from 0, not {value!r}")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"a duration is a finite number of seconds, not {self.seconds}")

    @property
    def known(self) -> dict[str, int | float]:
        """What is known, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def require(self, name: str) -> Any:
        """The value of a field.

        Raises:
            BudgetError: It is not known.
        """
        value = getattr(self, name)
        if value is None:
            known = ", ".join(f"{key}={number}" for key, number in self.known.items()) or "nothing known"
            raise BudgetError(f"an item with {known}", f"items whose {name} is known", f"ItemSize({name}=...)")
        return value


SizeLike: TypeAlias = ItemSize | int
"""An item as `plan` takes it; a number is that of its native tokens."""


def sizes_of(items: Sequence[SizeLike]) -> list[ItemSize]:
    """Every item as an ItemSize."""
    return [item if isinstance(item, ItemSize) else ItemSize(native=item) for item in items]


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeCost:
    """Native tokens of a system by unit of its input; None where it does not read such input or the rate varies."""

    per_second: float | None = None
    per_frame: float | None = None
    per_image: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """What one item had, might have used and used: `used <= cap <= native`."""

    native: int
    cap: int
    used: int
    rounds: int = 1
    error: float | None = None
    """Achieved reconstruction error, where the system measures one."""
    accepted: int | None = None
    """Tokens of a text that a draft had, as a certifying reading found; its end counts as one."""
    written: int | None = None
    """All tokens of that text."""

    def __post_init__(self) -> None:
        if not 0 <= self.used <= self.cap <= self.native:
            raise ValueError(f"usage must keep 0 <= used <= cap <= native, not {self.used}, {self.cap}, {self.native}")

    @property
    def retention(self) -> float:
        """Share of the native tokens that was used; 1 for an item that had none."""
        return self.used / self.native if self.native else 1.0
