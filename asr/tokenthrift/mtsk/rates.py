"""Rates, how many tokens they make, and the choice of rates that fits a budget.

Source: Llama-MTSK (arXiv 2503.06362), section 3: a rate is the number of encoder states that make one token, and one
model serves every pair of an audio and a video rate. The paper fixes the pair by hand; the choice is ours. Among the
pairs whose tokens fit the budget it takes the one with the fewest word errors on development data, which the model
brings along as a table; of two that are equal the quicker, then the one with fewer tokens; where nothing was measured,
the one with the most.

Plain Python: the tokens of an input are known without torch, weights or device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tokenthrift.budget import BudgetError, BudgetSupport, TokenBudget, TokenUsage

__all__ = ["SUPPORT", "Measured", "RatePlan", "Rates", "choose", "count_tokens", "error_of"]

SUPPORT = BudgetSupport(fields=frozenset({"max_tokens", "retention", "tokens_per_second"}))
CLEAN_DB = 40.0
"""Signal-to-noise ratio that counts as clean."""


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

    def fits(self, *, audio: bool, video: bool) -> bool:
        """Whether an item with these streams has those that the pair takes."""
        return (audio or not self.audio) and (video or not self.video)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of a model's table: the errors of a pair of rates on development data."""

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
class RatePlan:
    """The rates chosen for an item, and its tokens before, allowed and after."""

    rates: Rates
    usage: TokenUsage


def count_tokens(rates: Rates, audio: int, video: int, *, whole_windows: bool = False) -> int:
    """Tokens of an item at a pair of rates, markers and prompt left out.

    Args:
        rates: the pair.
        audio: encoder states of its audio.
        video: frames of its video.
        whole_windows: leave out the states that fill no window, as published.
    """
    parts = ((audio, rates.audio), (video, rates.video))
    return sum(states // rate if whole_windows else -(-states // rate) for states, rate in parts if rate)


def error_of(table: Iterable[Measured], rates: Rates, snr: float | None) -> Measured | None:
    """The line of a pair in the condition nearest to a given one.

    Args:
        table: the model's measurements.
        rates: the pair.
        snr: of the item in dB; None for clean.
    """
    level = CLEAN_DB if snr is None else snr
    lines = [line for line in table if line.rates == rates]
    return min(lines, key=lambda line: abs((CLEAN_DB if line.snr is None else line.snr) - level), default=None)


def choose(
    tokens: Mapping[Rates, int],
    table: Sequence[Measured],
    native: int,
    seconds: float,
    budget: TokenBudget,
    snr: float | None = None,
) -> RatePlan:
    """The best pair of rates that an item can afford.

    Args:
        tokens: of the item at every pair that the model was trained for and the item has the streams of; one or more.
        table: development-set word errors by pair and noise.
        native: encoder states of the item.
        seconds: its duration.
        budget: ceilings for the item.
        snr: noise of its audio in dB; None takes it for clean.

    Raises:
        BudgetError: no pair fits; the nearest legal value is the count of the nearest pair.
    """
    SUPPORT.check(budget)
    # The floor is compared with what rates can give, so that the nearest legal value is one of theirs.
    cap = replace(budget, min_tokens=0).cap(native, seconds)
    fitting = [rates for rates, count in tokens.items() if min(budget.min_tokens, native) <= count <= cap]
    if not fitting:
        possible = ", ".join(f"{count} at {rates}" for rates, count in sorted(tokens.items(), key=lambda p: p[1]))
        nearest = min(tokens.values(), key=lambda count: (abs(count - cap), count))
        raise BudgetError(f"{budget.to_dict()} gives {cap} of {native} tokens", possible, f"max_tokens={nearest}")

    def rank(rates: Rates) -> tuple[float, float, int]:
        line = error_of(table, rates, snr)
        if line is None:
            # Pairs that were measured come first; without any measurement the most detail is the best guess.
            return (float("inf"), 0.0, -tokens[rates])
        return (line.wer, line.milliseconds or 0.0, tokens[rates])

    best = min(fitting, key=rank)
    return RatePlan(best, TokenUsage(native=native, cap=cap, used=tokens[best]))
