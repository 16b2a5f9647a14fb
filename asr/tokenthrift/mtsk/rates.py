"""Rates, what they cost in tokens, and the choice of rates that fits a budget.

Source: Llama-MTSK (arXiv 2503.06362), section 3: a rate is the number of encoder states that make one token, and one
model serves every pair of an audio and a video rate. The paper fixes the pair by hand; the choice is ours. Among the
pairs whose tokens fit the budget it takes the one with the fewest word errors on development data, which the model
brings along as a table; of two that are equal the quicker, then the one with fewer tokens; where nothing was measured,
the one with the most.

Plain Python: the price of an input is known without torch, weights or device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenthrift.budget import BudgetError, BudgetSupport, TokenBudget, TokenUsage

__all__ = ["SUPPORT", "Measured", "Price", "Rates", "choose", "compressed_length", "error_of", "price"]

SUPPORT = BudgetSupport(fields=frozenset({"max_tokens", "retention", "tokens_per_second"}))


@dataclass(frozen=True, slots=True)
class Rates:
    """States per token of each modality; 0 leaves the modality out."""

    audio: int = 0
    video: int = 0

    def __post_init__(self) -> None:
        if self.audio < 0 or self.video < 0 or not (self.audio or self.video):
            raise ValueError(f"rates are 0 or more, one of them above 0, not ({self.audio}, {self.video})")

    def __str__(self) -> str:
        return f"({self.audio}, {self.video})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of a model's table: what a pair of rates is worth on development data."""

    audio: int
    video: int
    wer: float
    """Word errors per word."""
    snr: float | None = None
    """Signal-to-noise ratio of the audio in dB; None for clean."""
    milliseconds: float | None = None
    """Measured time per second of speech, where it was measured."""

    @property
    def rates(self) -> Rates:
        """The pair."""
        return Rates(self.audio, self.video)


@dataclass(frozen=True, slots=True)
class Price:
    """What an item will cost: its rates, and tokens before, allowed and after."""

    rates: Rates
    usage: TokenUsage


def compressed_length(states: int, rate: int, *, whole_windows: bool = False) -> int:
    """Tokens that so many encoder states become at a rate."""
    return states // rate if whole_windows else -(-states // rate)


def price(rates: Rates, audio: int, video: int, *, whole_windows: bool = False) -> int:
    """Tokens of an item at a pair of rates, markers and prompt left out.

    Args:
        rates: the pair.
        audio: encoder states of its audio.
        video: frames of its video.
        whole_windows: count as published, see `compression`.
    """
    parts = ((audio, rates.audio), (video, rates.video))
    return sum(compressed_length(states, rate, whole_windows=whole_windows) for states, rate in parts if rate)


def error_of(table: Iterable[Measured], rates: Rates, snr: float | None) -> Measured | None:
    """The line of a pair in the condition nearest to the one asked for; clean is taken for very little noise.

    Args:
        table: the model's measurements.
        rates: the pair.
        snr: of the item in dB; None for clean.
    """
    clean = 40.0
    wanted = clean if snr is None else min(snr, clean)
    lines = [line for line in table if line.rates == rates]
    return min(lines, key=lambda line: abs((clean if line.snr is None else line.snr) - wanted), default=None)


def choose(
    prices: Mapping[Rates, int],
    table: Sequence[Measured],
    native: int,
    seconds: float,
    budget: TokenBudget,
    snr: float | None = None,
) -> Price:
    """The best pair of rates that an item can afford.

    Args:
        prices: tokens of every pair that the model was trained for and the item has the streams of; at least one.
        table: development-set word errors by pair and noise.
        native: encoder states of the item.
        seconds: its duration.
        budget: ceilings for the item.
        snr: noise of its audio in dB; None takes it for clean.

    Raises:
        BudgetError: no pair fits; the nearest legal value is the price of the cheapest.
    """
    SUPPORT.check(budget)
    # The floor is held against what rates can give, so that the nearest legal value is one of theirs.
    cap = replace(budget, min_tokens=0).cap(native, seconds)
    fitting = [rates for rates, tokens in prices.items() if min(budget.min_tokens, native) <= tokens <= cap]
    if not fitting:
        offered = ", ".join(f"{tokens} at {rates}" for rates, tokens in sorted(prices.items(), key=lambda p: p[1]))
        nearest = min(prices.values(), key=lambda tokens: (abs(tokens - cap), tokens))
        raise BudgetError(f"{budget.to_dict()} gives {cap} of {native} tokens", offered, f"max_tokens={nearest}")

    def rank(rates: Rates) -> tuple[float, float, int]:
        line = error_of(table, rates, snr)
        if line is None:
            # Pairs that were measured come first; without any measurement the most detail is the best guess.
            return (float("inf"), 0.0, -prices[rates])
        return (line.wer, line.milliseconds or 0.0, prices[rates])

    best = min(fitting, key=rank)
    return Price(best, TokenUsage(native=native, cap=cap, used=prices[best]))
