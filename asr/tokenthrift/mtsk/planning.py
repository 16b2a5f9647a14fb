"""Which rates an item gets and how many tokens that makes, before anything is computed.

Source: Llama-MTSK (arXiv 2503.06362), section 3, where the pair of rates is fixed by hand for a whole run. What
differs: each item has the rates its budget affords, and the number of its tokens is known from its length alone.

Plain Python: a configuration and lengths are enough, no torch and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenthrift.budget import (
    BudgetError,
    BudgetLike,
    ItemSize,
    NativeCost,
    SizeLike,
    TokenBudget,
    budgets_for,
    sizes_of,
)
from tokenthrift.mtsk.config import MtskConfig
from tokenthrift.mtsk.rates import RatePlan, Rates, choose, count_tokens

__all__ = [
    "FRAMES_PER_SECOND",
    "SAMPLE_RATE",
    "STATES_PER_SECOND",
    "ItemPlan",
    "audio_states",
    "ladder_tokens",
    "native_cost",
    "plan_item",
    "plan_items",
    "shares_prefix",
    "streams_of",
]

SAMPLE_RATE = 16_000
STATES_PER_SECOND = 50
FRAMES_PER_SECOND = 25
RELEASED_LEAST_STATES = 25


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """The rates of an item and their tokens.

    Attributes:
        first: the rates of the first pass.
        last: the rates of the last pass, and the usage of both passes together; `first` again where one pass is all.
        first_tokens: tokens of the first pass.
    """

    first: Rates
    last: RatePlan
    first_tokens: int


def audio_states(samples: int, *, released: bool = False) -> int:
    """Whisper states of a recording of so many samples at 16 kHz: one for every started 20 ms, at least one.

    Args:
        samples: its length.
        released: count as the authors' code does for a recording on its own: whole 20 ms, 25 at least.
    """
    if released:
        return max(int(samples / SAMPLE_RATE * STATES_PER_SECOND), RELEASED_LEAST_STATES)
    return max(1, -(-samples * STATES_PER_SECOND // SAMPLE_RATE))


def streams_of(config: MtskConfig, item: ItemSize) -> tuple[int, int]:
    """Encoder states of the audio and of the video of an item, of the streams that the model reads; 0 without.

    Raises:
        BudgetError: nothing is known of any stream that the model reads.
    """
    seconds = item.seconds if config.audio is not None else None
    frames = item.frames if config.video is not None else None
    if seconds is None and frames is None:
        item.require("seconds" if config.audio is not None else "frames")
    samples = None if seconds is None else round(seconds * SAMPLE_RATE)
    return 0 if samples is None else audio_states(samples, released=config.released), frames or 0


def native_cost(config: MtskConfig) -> NativeCost:
    """Encoder states for a second of sound and for a frame of video."""
    return NativeCost(
        per_second=None if config.audio is None else STATES_PER_SECOND, per_frame=None if config.video is None else 1
    )


def plan_items(
    config: MtskConfig,
    items: Sequence[SizeLike],
    budget: BudgetLike | Sequence[BudgetLike] = None,
    *,
    rates: Rates | None = None,
    coarse_to_fine: bool = False,
    beams: int | None = None,
    snrs: Sequence[float | None] | None = None,
) -> list[ItemPlan]:
    """The plans of items whose lengths are known.

    Args:
        config: of the model.
        items: seconds of sound, frames of video at 25 a second, or both.
        budget: ceilings for each item, or a list with one budget for each.
        rates: take these rates; the ceilings hold all the same.
        coarse_to_fine: the usage is that of both passes.
        beams: width of the search, that of the model if not given; only a greedy second pass continues the first.
        snrs: noise of the audio of each item in dB, None for clean.

    Raises:
        BudgetError: nothing fits the ceilings, an item lacks the streams that the model was trained for, or its
            lengths are not known.
        ValueError: the model was not trained for the rates.
    """
    sizes = sizes_of(items)
    return [
        plan_item(config, item, limit, rates=rates, snr=snr, coarse_to_fine=coarse_to_fine, beams=beams)
        for item, limit, snr in zip(sizes, budgets_for(budget, len(sizes)), snrs or [None] * len(sizes), strict=True)
    ]


def plan_item(
    config: MtskConfig,
    item: ItemSize,
    budget: TokenBudget,
    *,
    rates: Rates | None = None,
    snr: float | None = None,
    coarse_to_fine: bool = False,
    beams: int | None = None,
) -> ItemPlan:
    """The plan of one item; see `plan_items`."""
    if rates is not None and rates not in config.scales:
        raise ValueError(f"the model has no rates {rates}; it has {', '.join(map(str, config.scales))}")
    states, frames = streams_of(config, item)
    possible = [r for r in config.scales if r.fits(audio=bool(states), video=bool(frames)) and rates in (None, r)]
    if not possible:
        streams = " and ".join(name for name, n in (("audio", states), ("video", frames)) if n) or "no stream"
        named = "any rates" if rates is None else f"rates {rates}"
        known = ", ".join(map(str, config.scales))
        raise BudgetError(f"an item with {streams} cannot have {named}", f"(audio, video) rates {known}", known)
    tokens = {r: count_tokens(r, states, frames, whole_windows=config.released) for r in possible}
    seconds = max(states / STATES_PER_SECOND, frames / FRAMES_PER_SECOND)
    if not coarse_to_fine:
        chosen = choose(tokens, config.table, states + frames, seconds, budget, snr)
        return ItemPlan(chosen.rates, chosen, chosen.usage.used)
    shared: dict[int, int] = {}
    if shares_prefix(config, config.decoding.beams if beams is None else beams):
        audio = {r.audio for r in tokens if r.audio}
        shared = {a: count_tokens(Rates(audio=a), states, 0, whole_windows=config.released) for a in audio}
    first, both = ladder_tokens(tokens, shared)
    chosen = choose(both, config.table, states + frames, seconds, budget, snr)
    return ItemPlan(first, chosen, tokens[first])


def ladder_tokens(tokens: Mapping[Rates, int], shared: Mapping[int, int]) -> tuple[Rates, dict[Rates, int]]:
    """The cheapest rates, and how many tokens it takes to try them first and then to continue with others.

    Args:
        tokens: of an item at each pair of rates.
        shared: tokens of its audio, by audio rate, that a second pass need not read again; empty where it must.
    """
    first = min(tokens, key=lambda rates: (tokens[rates], rates.audio, rates.video))
    both = {
        rates: count
        if rates == first
        else tokens[first] + count - (shared.get(first.audio, 0) if rates.audio == first.audio else 0)
        for rates, count in tokens.items()
    }
    return first, both


def shares_prefix(config: MtskConfig, beams: int) -> bool:
    """Whether two pairs with one audio rate read the same start: one adapter, and a search that can continue it."""
    return config.lora.strategy == "MS" and beams == 1
