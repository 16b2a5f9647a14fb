"""What test recognizers share that write by rule: the price is one token, whatever the recording."""

from __future__ import annotations

from collections.abc import Sequence

from tokenthrift.budget import BudgetLike, BudgetSupport, SizeLike, TokenUsage

RATE = 16_000
USAGE = TokenUsage(native=1, cap=1, used=1)


class OneToken:
    """All of a `Recognizer` but `transcribe`."""

    support = BudgetSupport(fields=frozenset())
    sample_rate = RATE
    max_seconds = 30.0

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        return tuple(USAGE for _ in items)
