"""Decode at the cheapest rates, keep what is confident, and read finer tokens only where it is not.

Not in Llama-MTSK (arXiv 2503.06362), whose one model for all rates makes it possible: the encoders run once, and where
both passes have the audio rate and the adapters in common, the second continues the prefix of the first.

A ceiling holds for both passes together: what is read twice counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenthrift.backbones.generation import Generation
from tokenthrift.mtsk.rates import Rates

__all__ = ["Outcome", "decode_in_two_passes"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A text, how many passes it took and how many tokens they read."""

    generation: Generation
    rounds: int
    used: int


def decode_in_two_passes(
    first: Sequence[Rates],
    last: Sequence[Rates],
    tokens: Sequence[tuple[int, int]],
    generate: Callable[[Rates, list[int]], list[Generation]],
    threshold: float,
) -> list[Outcome]:
    """Decodes a batch once at its first rates, and what is below the threshold again at its last.

    Args:
        first: the rates of each item's first pass.
        last: of its second; the same where one pass is all it can have.
        tokens: of the first pass, and of both.
        generate: texts of some items at a pair of rates.
        threshold: confidence from which the first text is kept.
    """
    outcomes: dict[int, Outcome] = {}
    for rates, rows in _groups(first, range(len(first))).items():
        for row, generation in zip(rows, generate(rates, rows), strict=True):
            outcomes[row] = Outcome(generation, 1, tokens[row][0])
    again = [r for r in range(len(first)) if last[r] != first[r] and outcomes[r].generation.confidence < threshold]
    for rates, rows in _groups(last, again).items():
        for row, generation in zip(rows, generate(rates, rows), strict=True):
            outcomes[row] = Outcome(generation, 2, tokens[row][1])
    return [outcomes[row] for row in range(len(first))]


def _groups(rates: Sequence[Rates], rows: Sequence[int]) -> dict[Rates, list[int]]:
    groups: dict[Rates, list[int]] = {}
    for row in rows:
        groups.setdefault(rates[row], []).append(row)
    return groups
