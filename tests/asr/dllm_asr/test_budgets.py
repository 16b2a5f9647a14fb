"""What plans promise, and the limits of tokens and of decoding."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest

from tests.asr.dllm_asr.transcripts import AUDIO, alike, decoding
from tests.asr.tiny_dllm import speech, tiny_model
from tokenthrift.budget import BudgetError, DecodeBudget, ItemSize, TokenBudget
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.config import DecodeConfig, SamplerName
from tokenthrift.dllm_asr.decoding import THRESHOLDED, make_sampler, settings_for
from tokenthrift.whisper import states_of


def test_usage_is_what_was_planned(model: DllmAsr) -> None:
    sizes = [len(samples) for samples in AUDIO]
    usage = [t.usage for t in model.transcribe(AUDIO)]
    planned = model.plan([ItemSize(seconds=n / 16_000) for n in sizes])
    assert [u.used for u in usage] == [u.cap for u in usage] == [p.used for p in planned]
    assert [u.native for u in usage] == [p.native for p in planned] == [states_of(n) for n in sizes]


def test_rounds_are_limited(model: DllmAsr) -> None:
    free = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0))
    assert max(t.usage.rounds for t in free) > 2
    for most in (1, 2):
        limited = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0, max_rounds=most))
        assert [t.usage.rounds for t in limited] == [min(most, t.usage.rounds) for t in free]
        with decoding(model, confidence_threshold=1.0, max_rounds=most) as own:
            for one, other in zip(own.transcribe(AUDIO), limited, strict=True):
                alike(one, other)
            more = own.transcribe(AUDIO, decode=DecodeBudget(max_rounds=99))
            assert [t.usage.rounds for t in more] == [t.usage.rounds for t in free]


def test_new_tokens_are_limited(model: DllmAsr) -> None:
    free = model.transcribe(AUDIO)
    assert max(len(t.tokens) for t in free) > 3
    for most in (1, 3):
        limited = model.transcribe(AUDIO, decode=DecodeBudget(max_new_tokens=most))
        assert max(len(t.tokens) for t in limited) <= most


def test_the_threshold_is_kept(model: DllmAsr) -> None:
    bold = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1e-6))
    assert {t.usage.rounds for t in bold} <= {0, 1}
    careful = model.transcribe(AUDIO, decode=DecodeBudget(confidence_threshold=1.0))
    assert sum(t.usage.rounds for t in careful) > sum(t.usage.rounds for t in bold)
    with decoding(model, confidence_threshold=1e-6):
        for limits in (None, DecodeBudget(), {"max_rounds": 9}):  # limits without one leave it to the model
            for one, other in zip(model.transcribe(AUDIO, decode=limits), bold, strict=True):
                alike(one, other)


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_a_threshold_is_honored_or_refused(name: Any) -> None:
    way, limits = DecodeConfig(sampler=name), DecodeBudget(confidence_threshold=0.625)
    options = vars(make_sampler(way, limits, 9)).values()
    if name in THRESHOLDED:
        assert settings_for(limits, way) is way
        assert 0.625 in options
    else:
        assert 0.625 not in options
        with pytest.raises(BudgetError, match="which has none"):
            settings_for(limits, way)


def test_recordings_that_fill_a_prefix_model_are_refused() -> None:
    model = tiny_model("bert")
    most = (model.config.backbone.max_position_embeddings - 2) * 4
    assert model.max_slots(most) == 1
    with pytest.raises(ValueError, match="leave no room for text in a model of 128 positions"):
        model.max_slots(most + 1)
    # Whatever the draft says, memory and response fit together.
    for transcript in model.transcribe([speech(9.0), speech(0.3)]):
        assert transcript.usage.used + len(transcript.tokens) < model.config.backbone.max_position_embeddings


def test_plans_are_exact_up_to_30_seconds_and_count_windows_beyond(model: DllmAsr) -> None:
    (one,) = model.plan([ItemSize(seconds=30.0)])
    three, none = model.plan([ItemSize(seconds=61.0), ItemSize(seconds=0.0)])
    assert one.native == 1500
    assert three.native == 61 * 50
    (rest,) = model.plan([ItemSize(seconds=1.0)])
    assert three.used == 2 * one.used + rest.used
    assert none.used == 1
    assert model.plan([1500]) == (one,)
    assert model.native_cost.per_second == 50
    with pytest.raises(BudgetError, match="seconds is known"):
        model.plan([ItemSize(frames=3)])


@pytest.mark.parametrize("budget", [64, "25%", "12.5/s", "e0.1", {"max_tokens": 5}, TokenBudget(retention=0.5)])
def test_ceilings_are_not_honored_and_say_so(whisper: DllmAsr, budget: Any) -> None:
    for call in (partial(whisper.plan, [ItemSize(seconds=1.0)]), partial(whisper.transcribe, [speech(0.3)])):
        with pytest.raises(BudgetError, match="no ceiling"):
            call(budget)
        with pytest.raises(BudgetError, match="no ceiling"):
            call([budget])


def test_a_floor_is_honored_for_each_recording(whisper: DllmAsr) -> None:
    sizes = [ItemSize(seconds=1.0), ItemSize(seconds=0.2)]
    assert [u.used for u in whisper.plan(sizes, [{"min_tokens": 25}, None])] == [25, 5]
    with pytest.raises(BudgetError, match="leaves 25 of 50 tokens"):
        whisper.plan(sizes, [{"min_tokens": 26}, None])
    with pytest.raises(ValueError, match="2 items but 1 budgets"):
        whisper.plan(sizes, [None])


def test_a_decode_budget_is_not_a_budget_of_tokens(whisper: DllmAsr) -> None:
    with pytest.raises(BudgetError, match="give it as decode="):
        whisper.transcribe([speech(0.3)], DecodeBudget(max_rounds=2))
    with pytest.raises(BudgetError, match="'max_round'"):
        whisper.transcribe([speech(0.3)], decode={"max_round": 2})
