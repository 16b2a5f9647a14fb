"""Decode at the cheapest rates, keep what is sure, and pay for finer ones only where it is not.

Not in Llama-MTSK (arXiv 2503.06362), whose one model for all rates makes it possible: the encoders run once, and where
both passes have the audio rate and the adapters in common, the second goes on from what the first has heard.

A ceiling holds for both passes together: what is read twice is paid for twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokenthrift.mtsk.decoding import Written
from tokenthrift.mtsk.rates import Rates

__all__ = ["Outcome", "confidence", "ladder_prices", "refine"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A text, how many passes it took and what they cost."""

    written: Written
    rounds: int
    used: int


def confidence(written: Written) -> float:
    """The geometric mean of the probabilities of a text's tokens and its end; 0 where one of them is 0."""
    if not written.probabilities or min(written.probabilities) <= 0:
        return 0.0
    return math.exp(sum(map(math.log, written.probabilities)) / len(written.probabilities))


def ladder_prices(prices: Mapping[Rates, int], heard: Mapping[int, int]) -> tuple[Rates, dict[Rates, int]]:
    """The cheapest rates, and what it costs to try them first and then go on with others.

    Args:
        prices: tokens of an item at each pair of rates.
        heard: tokens of its audio, by audio rate, that a second pass need not read again; empty where it must.
    """
    first = min(prices, key=lambda rates: (prices[rates], rates.audio, rates.video))
    both = {
        rates: tokens
        if rates == first
        else prices[first] + tokens - (heard.get(first.audio, 0) if rates.audio == first.audio else 0)
        for rates, tokens in prices.items()
    }
    return first, both


def refine(
    first: Sequence[Rates],
    last: Sequence[Rates],
    prices: Sequence[tuple[int, int]],
    decode: Callable[[Rates, list[int]], list[Written]],
    threshold: float,
) -> list[Outcome]:
    """Decodes a batch once at its first rates, and what is unsure again at its last.

    Args:
        first: the rates of each item's first pass.
        last: of its second; the same where one pass is all it can have.
        prices: tokens of the first pass, and of both.
        decode: texts of some items at a pair of rates.
        threshold: confidence from which the first text is kept.
    """
    outcomes: dict[int, Outcome] = {}
    for rates, rows in _groups(first, range(len(first))).items():
        for row, written in zip(rows, decode(rates, rows), strict=True):
            outcomes[row] = Outcome(written, 1, prices[row][0])
    unsure = [r for r in range(len(first)) if last[r] != first[r] and confidence(outcomes[r].written) < threshold]
    for rates, rows in _groups(last, unsure).items():
        for row, written in zip(rows, decode(rates, rows), strict=True):
            outcomes[row] = Outcome(written, 2, prices[row][1])
    return [outcomes[row] for row in range(len(first))]


def _groups(rates: Sequence[Rates], rows: Sequence[int]) -> dict[Rates, list[int]]:
    groups: dict[Rates, list[int]] = {}
    for row in rows:
        groups.setdefault(rates[row], []).append(row)
    return groups
