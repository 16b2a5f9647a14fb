"""Which rate of the adapter a recording is read at, and how many memory positions that makes, before anything runs.

Not in the paper (dLLM-ASR, arXiv 2601.17902), whose adapter has one rate of 12.5 positions a second. A model that was
trained at several (Matryoshka training, Kusupati et al., 2022; for speech Llama-MTSK, arXiv 2503.06362) reads a
recording at the finest of them that its budget affords. The states that do not fill a position are one more, unless
the ceiling has no room for it: then they belong to the last one, so that `12.5/s` is 12.5 a second for any length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenthrift.budget import BudgetError, BudgetSupport, ItemSize, TokenBudget, TokenUsage
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.whisper import MAX_STATES, SAMPLE_RATE, states_of

__all__ = ["STATE_RATE", "Rate", "adapted_length", "choose_rate", "support_of"]

STATE_RATE = 50.0  # encoder states a second


@dataclass(frozen=True, slots=True)
class Rate:
    """How a recording is read.

    Attributes:
        pool: encoder states that are averaged to one, before the stride of the adapter.
        positions: memory positions that makes.
    """

    pool: int
    positions: int


def adapted_length(states: int, config: AdapterConfig, pool: int | None = None) -> int:
    """Memory positions that so many encoder states of one pass become.

    Args:
        states: of the encoder.
        config: of the adapter.
        pool: encoder states that are averaged to one; None for that of the configuration.
    """
    pooled = -(-states // (pool or config.pool))
    return -(-pooled // config.stride)


def support_of(config: AdapterConfig) -> BudgetSupport:
    """The ceilings that an adapter honors: none where it has one rate."""
    if len(config.trained_pools) == 1:
        return BudgetSupport(fields=frozenset())
    rates = tuple(STATE_RATE / (pool * config.stride) for pool in config.trained_pools)
    return BudgetSupport(fields=frozenset({"max_tokens", "retention", "tokens_per_second"}), rates=rates)


def choose_rate(size: ItemSize, budget: TokenBudget, config: AdapterConfig) -> tuple[Rate, TokenUsage]:
    """The rate of a recording under a budget, and what it uses; exact.

    Without a ceiling it is that of the configuration. A recording of more than 30 s is several passes of one rate.

    Args:
        size: its seconds or its encoder states; `tokens_per_second` takes states as 20 ms where no seconds are known.
        budget: ceilings and floor.
        config: of the adapter.

    Raises:
        BudgetError: a ceiling that is not honored, or that no rate keeps to, or a floor that is not reached.
    """
    support = support_of(config)
    support.check(budget)
    native = states_of(round(size.require("seconds") * SAMPLE_RATE)) if size.native is None else size.native
    seconds = native / STATE_RATE if size.seconds is None else size.seconds
    passes = [MAX_STATES] * (native // MAX_STATES) + [native % MAX_STATES] * bool(native % MAX_STATES or not native)
    rate = Rate(config.pool, sum(adapted_length(states, config) for states in passes))
    if any(getattr(budget, name) is not None for name in support.fields):
        rate = _finest(passes, budget.cap(native, seconds), config)
    fitted = replace(support, max_tokens=rate.positions)
    (usage,) = fitted.plan([ItemSize(native=native, seconds=seconds)], budget)
    return rate, usage


def _finest(passes: list[int], cap: int, config: AdapterConfig) -> Rate:
    """The rate with most positions within a cap, the finer among equals."""
    possible = []
    for pool in config.trained_pools:
        counts = [adapted_length(states, config, pool) for states in passes]
        # The rest of each pass may belong to its last whole position.
        fewest = sum(max(min(count, 1), count - 1) for count in counts)
        if fewest <= cap:
            possible.append(Rate(pool, min(cap, sum(counts))))
    if not possible:
        coarsest = config.trained_pools[-1]
        least = sum(max(1, adapted_length(states, config, coarsest) - 1) for states in passes)
        rates = ", ".join(f"{STATE_RATE / (pool * config.stride):g}" for pool in config.trained_pools)
        raise BudgetError(f"at most {cap} of {sum(passes)} encoder states", f"the rates {rates} a second", least)
    return max(possible, key=lambda rate: (rate.positions, -rate.pool))
