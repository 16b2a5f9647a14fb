"""Rates of the adapter: a token budget chooses one for each recording, and the plan is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.tiny_dllm import Family, speech, tiny_model
from tokenthrift.budget import BudgetError, BudgetSupport, ItemSize, TokenBudget
from tokenthrift.config import ConfigError
from tokenthrift.dllm_asr.adapter import Adapter
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.rates import Rate, adapted_length, choose_rate
from tokenthrift.models import describe

POOLS = (1, 2, 4, 8)
CONFIG = AdapterConfig(pool=2, stride=1, pools=POOLS)
AUDIO = [speech(seconds, seed) for seed, seconds in enumerate([0.9, 0.31, 2.07, 0.02])]
few = settings(deadline=None, max_examples=50)


def ladder(family: Family = "whisper", **decode: Any) -> DllmAsr:
    """A tiny model of four rates, in double precision."""
    return tiny_model(family, pools=POOLS, **decode).double()


@pytest.mark.parametrize(
    ("budget", "pool", "positions"),
    [
        (None, 2, 250),
        ("100%", 1, 500),
        ("50/s", 1, 500),
        ("25/s", 2, 250),
        ("12.5/s", 4, 125),
        ("6.25/s", 8, 63 - 1),
        ("24.9/s", 2, 249),
        ("24/s", 4, 125),
        (499, 1, 499),
        (498, 2, 250),
        (64, 8, 63),
        ("25%", 4, 125),
        ({"retention": 0.5, "max_tokens": 130}, 4, 125),
    ],
)
def test_a_ceiling_takes_the_finest_rate_that_keeps_to_it(budget: Any, pool: int, positions: int) -> None:
    rate, usage = choose_rate(ItemSize(seconds=10.0), TokenBudget.parse(budget), CONFIG)
    assert rate == Rate(pool, positions)
    assert (usage.native, usage.cap, usage.used) == (500, positions, positions)


@given(seconds=st.floats(0.02, 95), nominal=st.sampled_from([50, 25, 12.5, 6.25]))
@few
def test_a_rate_by_name_is_that_rate_at_any_length(seconds: float, nominal: float) -> None:
    """A strict ceiling of 12.5 a second must not fall to the next rate for the last started position."""
    budget = TokenBudget(tokens_per_second=nominal, min_tokens=0)
    try:
        rate, usage = choose_rate(ItemSize(seconds=seconds), budget, CONFIG)
    except BudgetError:
        assert int(seconds * nominal) == 0
        return
    assert usage.used <= seconds * nominal
    if seconds * nominal >= 2 and seconds < 30:
        assert rate.pool == 50 / nominal
        assert usage.used > seconds * nominal - 2


@given(states=st.integers(0, 4000), cap=st.integers(1, 4000))
@few
def test_never_more_than_the_ceiling_and_never_coarser_than_needed(states: int, cap: int) -> None:
    passes = [1500] * (states // 1500) + [states % 1500]
    size, budget = ItemSize(native=states), TokenBudget(max_tokens=cap, min_tokens=0)
    if cap < sum(max(min(n, 1), adapted_length(n, CONFIG, 8) - 1) for n in passes):
        with pytest.raises(BudgetError, match="the rates 50, 25"):
            choose_rate(size, budget, CONFIG)
        return
    rate, usage = choose_rate(size, budget, CONFIG)
    assert usage.used == rate.positions <= min(cap, states)
    for finer in (pool for pool in POOLS if pool < rate.pool):
        count = sum(adapted_length(n, CONFIG, finer) for n in passes)
        assert count > cap or count == rate.positions


def test_what_is_refused_says_what_there_is() -> None:
    with pytest.raises(BudgetError, match=r"at most 40 of 500 encoder states; allowed: the rates 50, 25, 12\.5, 6\.25"):
        choose_rate(ItemSize(seconds=10), TokenBudget(max_tokens=40), CONFIG)
    with pytest.raises(BudgetError, match="target_error"):
        choose_rate(ItemSize(seconds=10), TokenBudget(target_error=0.1), CONFIG)
    with pytest.raises(BudgetError, match="min_tokens=300"):
        choose_rate(ItemSize(seconds=10), TokenBudget(min_tokens=300), CONFIG)
    for pools in ((2, 1), (1, 4), (2, 2), (0, 2), (2, 9)):
        with pytest.raises(ConfigError, match="adapter"):
            AdapterConfig(pool=2, pools=pools)


@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_a_batch_have_rates_of_their_own(stride: int) -> None:
    config = AdapterConfig(pool=2, stride=stride, pools=POOLS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = Adapter(config, 6, 6 if stride == 1 else 10).double()
    lengths = torch.tensor([40, 13, 25, 40, 9])
    states = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = states.masked_fill((torch.arange(40) >= lengths[:, None])[..., None], torch.nan)
    rates = [
        Rate(pool, max(1, adapted_length(int(n), config, pool) - left))
        for pool, n, left in zip((1, 4, 8, 8, 2), lengths, (0, 0, 1, 0, 1), strict=True)
    ]
    with torch.no_grad():
        memory, mask = adapter(states, lengths, rates)
        assert mask.sum(1).tolist() == [rate.positions for rate in rates]
        for row, n in enumerate(lengths.tolist()):
            alone, _ = adapter(states[row : row + 1, :n], lengths[row : row + 1], rates[row : row + 1])
            torch.testing.assert_close(memory[row][mask[row]], alone[0], rtol=0, atol=1e-12)
            if rates[row].positions == adapted_length(n, config, rates[row].pool):
                plain, seen = adapter(states[row : row + 1, :n], lengths[row : row + 1], rates[row].pool)
                torch.testing.assert_close(alone[0], plain[0][seen[0]], rtol=0, atol=1e-12)
        if stride == 1:  # 25 states of eight, four positions asked for, three there are room for
            torch.testing.assert_close(memory[2, 2], states[2, 16:25].mean(0))


@pytest.mark.parametrize("family", ["whisper", "llama"])
def test_transcripts_at_mixed_rates_are_those_of_each_alone(family: Family) -> None:
    model = ladder(family, draft_threshold=0.5)
    budgets: list[Any] = ["50/s", "8/s", None, {"max_tokens": 1}]
    together = model.transcribe(AUDIO, budgets)
    planned = model.plan([ItemSize(seconds=len(a) / 16_000) for a in AUDIO], budgets)
    assert [t.usage.used for t in together] == [t.usage.cap for t in together] == [p.used for p in planned]
    for audio, budget, transcript in zip(AUDIO, budgets, together, strict=True):
        (alone,) = model.transcribe([audio], budget)
        assert (alone.text, alone.usage) == (transcript.text, transcript.usage)


def test_the_windows_of_the_draft_follow_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ladder(draft_threshold=0.5)
    found = []
    forward = model.backbone.forward

    def spied(*given: Any) -> Any:
        found.append(given[3])
        return forward(*given)

    monkeypatch.setattr(model.backbone, "forward", spied)
    for budget in ("25/s", "6.25/s"):
        model.transcribe([AUDIO[2]], budget)
        found[1:] = found[-1:] if budget == "6.25/s" else []
    finite = torch.isfinite(found[0][..., 1])
    slots = min(found[0].shape[1], found[1].shape[1])
    assert finite.any()
    torch.testing.assert_close(found[0][:, :slots] / 4, found[1][:, :slots])


def test_a_model_of_one_rate_takes_no_ceiling_and_one_of_four_says_which(tmp_path: Any) -> None:
    assert tiny_model().support == BudgetSupport(fields=frozenset())
    model = tiny_model(pools=POOLS)
    assert model.support.rates == (50, 25, 12.5, 6.25)
    assert model.support.fields == {"max_tokens", "retention", "tokens_per_second"}
    model.save_pretrained(tmp_path)
    assert "(one of 50, 25, 12.5, 6.25 tokens a second)" in describe(tmp_path)
    assert DllmAsr.from_pretrained(tmp_path).config.adapter == CONFIG
