"""Plans of Llama-MTSK: the laws of budgets, the choice of rates by the table, two passes, and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.asr.tiny_mtsk import around, lips, plan_one, size_of, speech, tiny_config, tiny_model
from tokenthrift.backbones.generation import Generation
from tokenthrift.budget import BudgetError, DecodeBudget, ItemSize, NativeCost, TokenBudget
from tokenthrift.mtsk import transcribing
from tokenthrift.mtsk.audiovisual.noise import estimate_snr
from tokenthrift.mtsk.coarse_to_fine import decode_in_two_passes
from tokenthrift.mtsk.config import Strategy
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.planning import audio_states, plan_items
from tokenthrift.mtsk.rates import Measured, Rates, count_tokens

ALL = ("avsr", "asr", "vsr")
CONFIG = tiny_config(tasks=ALL)
TABLE = (
    *(Measured(audio=a, video=v, wer=w) for a, v, w in ((4, 2, 0.02), (16, 2, 0.05), (4, 5, 0.02), (16, 5, 0.07))),
    *(
        Measured(audio=a, video=v, wer=w, snr=0.0)
        for a, v, w in ((4, 2, 0.2), (16, 2, 0.21), (4, 5, 0.4), (16, 5, 0.5))
    ),
)
budgets = st.builds(
    TokenBudget,
    max_tokens=st.none() | st.integers(1, 400),
    retention=st.none() | st.floats(0.01, 1),
    tokens_per_second=st.none() | st.floats(0.5, 80),
)


@given(st.integers(0, 1500), st.integers(0, 750), budgets, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=80)
def test_laws_of_the_budget(states: int, frames: int, budget: TokenBudget, ladder: bool, measured: bool) -> None:
    config = replace(CONFIG, table=TABLE if measured else ())
    if not (states or frames):
        with pytest.raises(BudgetError, match="seconds"):
            plan_one(config, states, frames, budget)
        return
    try:
        plan = plan_one(config, states, frames, budget, coarse_to_fine=ladder)
    except BudgetError as error:
        nearest = plan_one(config, states, frames, int(str(error.nearest)[11:])).last.usage.used
        possible = [r for r in config.scales if r.fits(audio=bool(states), video=bool(frames))]
        cap = replace(budget, min_tokens=0).cap(states + frames, max(states / 50, frames / 25))
        assert nearest == min(count_tokens(r, states, frames) for r in possible) > cap
        return
    usage = plan.last.usage
    assert 0 < plan.first_tokens <= usage.used <= usage.cap <= usage.native == states + frames
    assert plan.first_tokens == count_tokens(plan.first, states, frames)
    if not ladder:
        assert usage.used == count_tokens(plan.last.rates, states, frames)
    if budget.max_tokens is not None:
        assert usage.used <= budget.max_tokens
        relaxed = replace(budget, max_tokens=budget.max_tokens + 10)
        assert plan_one(config, states, frames, relaxed, coarse_to_fine=ladder).last.usage.cap >= usage.cap


def test_fields_that_mean_nothing_here_are_refused() -> None:
    with pytest.raises(BudgetError, match="target_error"):
        plan_one(CONFIG, 100, 50, "e0.1")
    with pytest.raises(ValueError, match=r"no rates \(3, 2\)"):
        plan_one(CONFIG, 100, 50, rates=Rates(3, 2))
    with pytest.raises(BudgetError, match=r"audio cannot have rates \(4, 2\)"):
        plan_one(CONFIG, 100, 0, rates=Rates(4, 2))
    with pytest.raises(BudgetError, match="audio cannot have any rates"):
        plan_one(tiny_config(), 100, 0)
    with pytest.raises(BudgetError, match=r"ItemSize\(seconds=\.\.\.\)"):
        tiny_model().plan([40])
    with pytest.raises(BudgetError, match=r"ItemSize\(frames=\.\.\.\)"):
        tiny_model(tasks=("vsr",), audio=None, audio_rates=()).plan([ItemSize(seconds=1.0)])
    with pytest.raises(ValueError, match="above 0"):
        Rates(0, 0)
    with pytest.raises(BudgetError, match="coarse_to_fine"):
        tiny_model().transcribe([speech(0.2, 1)], [lips(0.2, 1)], decode=DecodeBudget(confidence_threshold=0.5))


def test_native_tokens_are_those_of_the_streams_that_the_model_reads() -> None:
    both, sound = tiny_model(tasks=ALL), tiny_model(tasks=("asr",), video=None, video_rates=())
    size = ItemSize(seconds=2.0, frames=25)
    assert [model.plan([size])[0].native for model in (both, sound)] == [125, 100]
    assert both.native_cost == NativeCost(per_second=50, per_frame=1)
    assert sound.native_cost == NativeCost(per_second=50)
    assert both.plan([ItemSize(seconds=2.0)], "10%")[0].cap == 10


def test_a_floor_rules_pairs_out_and_the_nearest_count_is_named() -> None:
    # At 500 states and 250 frames: 250 tokens at (4, 2), 157 at (16, 2), 175 at (4, 5), 82 at (16, 5).
    config = replace(tiny_config(), table=(Measured(audio=16, video=5, wer=0.0),))
    assert plan_one(config, 500, 250).last.rates == Rates(16, 5)
    assert plan_one(config, 500, 250, {"min_tokens": 100}).last.rates == Rates(4, 2)
    with pytest.raises(BudgetError, match="nearest legal value: max_tokens=175"):
        plan_one(config, 500, 250, {"max_tokens": 171, "min_tokens": 160})


def test_two_passes_read_the_audio_twice_unless_the_second_continues_the_first() -> None:
    config = tiny_config()
    greedy, searched = (
        plan_one(config, 500, 250, rates=None, coarse_to_fine=True, beams=beams).last.usage.used for beams in (1, 3)
    )
    assert greedy == searched == 82 + 250, "the finest pair has another audio rate"
    same_audio = replace(config, audio_rates=(16,))
    # (16, 5) reads 32 + 50 tokens, (16, 2) reads 32 + 125.
    counts = [plan_one(same_audio, 500, 250, coarse_to_fine=True, beams=beams).last.usage.used for beams in (1, 3)]
    assert counts == [82 + 125, 82 + 157]
    published = replace(same_audio, compat="released")
    # Whole windows only: 31 + 50 and 31 + 125.
    assert plan_one(published, 500, 250, coarse_to_fine=True, beams=1).last.usage.used == 81 + 125
    assert plan_one(published, 500, 250, coarse_to_fine=True).last.usage.used == 81 + 156, "15 beams as published"


def test_batches_hold_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribing, "BATCH_SECONDS", 1.0)
    model = tiny_model(tasks=ALL)
    sizes: list[int] = []
    lm: Any = model.language_model.model
    lm.register_forward_pre_hook(lambda m, a, k: sizes.append(len(k["inputs_embeds"])), with_kwargs=True)
    audio = [speech(seconds, 1) for seconds in (0.3, 0.6, 0.5, 0.4)]
    model.transcribe(audio, rates=Rates(4), decode={"max_new_tokens": 1})
    assert sizes == [1, 2, 1], "0.6; 0.5 and 0.4; 0.3"


def test_a_text_exactly_at_the_threshold_is_kept() -> None:
    read: list[Rates] = []

    def generate(rates: Rates, rows: list[int]) -> list[Generation]:
        read.append(rates)
        return [Generation((1,), (chance, chance)) for chance in (0.5, 0.49)][: len(rows)]

    coarse, fine = Rates(16), Rates(4)
    outcomes = decode_in_two_passes([coarse] * 2, [fine] * 2, [(3, 13)] * 2, generate, 0.5)
    assert [(outcome.rounds, outcome.used) for outcome in outcomes] == [(1, 3), (2, 13)]
    assert read == [coarse, fine]


def test_each_item_may_have_a_budget_of_its_own() -> None:
    model = tiny_model(tasks=ALL)
    audio, video = [speech(1.0, 1), speech(1.0, 2)], [lips(1.0, 1), lips(1.0, 2)]
    limits: list[Any] = [{"max_tokens": 20}, None]
    found = model.transcribe(audio, video, limits)
    assert [t.usage for t in found] == list(model.plan([size_of(50, 25)] * 2, limits))
    assert [t.usage.cap for t in found] == [20, 75]
    with pytest.raises(ValueError, match="2 items but 1 budgets"):
        model.transcribe(audio, video, [20])


@given(st.integers(1, 480_000))
@example(8_001)
@example(32_321)
def test_states_of_a_recording(samples: int) -> None:
    assert audio_states(samples) == -(-samples // 320)
    assert audio_states(samples, released=True) == max(samples // 320, 25)
    seconds = ItemSize(seconds=samples / 16_000)
    only = tiny_config(tasks=("asr",), video=None, video_rates=())
    assert plan_items(only, [seconds])[0].last.usage.native == -(-samples // 320)


@pytest.mark.parametrize("seconds", [0.1, 0.51, 1.3])
def test_released_models_use_what_they_plan(seconds: float) -> None:
    """The published code leaves out states that fill no window, and keeps 25 states at least."""
    model = tiny_model(compat="released", tasks=ALL, audio_rates=(3,), video_rates=(2,))
    sound, crops = speech(seconds, 1), lips(max(seconds, 0.2), 1)
    read: list[int] = []
    lm: Any = model.language_model.model
    lm.register_forward_pre_hook(lambda m, a, k: read.append(k["inputs_embeds"].shape[1]), with_kwargs=True)
    decode = DecodeBudget(max_new_tokens=1)
    (found,) = model.transcribe([sound], [crops], rates=Rates(3, 2), decode=decode, beams=1)
    assert found.usage.used == sum(read) - around(model, Rates(3, 2), Rates(3, 2))
    assert (found.usage,) == model.plan([ItemSize(seconds=len(sound) / 16_000, frames=len(crops))], rates=Rates(3, 2))
    both = model.transcribe([sound, speech(2.0, 2)], [crops, lips(2.0, 2)], rates=Rates(3, 2), decode=decode, beams=1)
    assert both[0] == found, "a released model too gives each item the transcript of the item alone"


def test_the_table_decides_and_noise_moves_tokens_from_audio_to_video() -> None:
    config = replace(tiny_config(), table=TABLE)

    def chosen(budget: str, snr: float | None = None) -> Rates:
        return plan_one(config, 500, 250, budget, snrs=[snr]).last.rates

    assert chosen("100%") == Rates(4, 5), "as good as (4, 2), and cheaper"
    assert chosen("175") == Rates(4, 5)
    assert chosen("174") == Rates(16, 2)
    assert chosen("175", snr=1.0) == Rates(16, 2), "lips help more than sound in noise"
    assert chosen("175", snr=19.9) == Rates(16, 2), "nearer to 0 dB than to clean"
    assert chosen("175", snr=20.1) == Rates(4, 5)
    assert chosen("175", snr=95.0) == Rates(4, 5)
    assert plan_one(tiny_config(), 500, 250).last.rates == Rates(4, 2), "unmeasured: the most detail"
    partly = replace(tiny_config(), table=TABLE[3:4])
    assert plan_one(partly, 500, 250).last.rates == Rates(16, 5), "what was measured comes first"


def test_of_pairs_that_err_alike_the_quicker_is_taken() -> None:
    quick = replace(TABLE[2], milliseconds=9.0)
    slow = replace(TABLE[0], milliseconds=10.0)
    for pair in ((quick, slow), (slow, quick)):
        assert plan_one(replace(tiny_config(), table=pair), 500, 250).last.rates == quick.rates
    quick, slow = (replace(line, milliseconds=19.0 - (line.milliseconds or 0)) for line in (quick, slow))
    dearer = plan_one(replace(tiny_config(), table=(quick, slow)), 500, 250).last
    assert dearer.rates == slow.rates, "time counts before tokens"


def test_a_saved_model_brings_its_table_and_chooses_by_noise(tmp_path: Path) -> None:
    tiny_model(table=TABLE).save_pretrained(tmp_path / "model")
    model = LlamaMtsk.from_pretrained(tmp_path / "model")
    assert model.config.table == TABLE
    clean = speech(1.0, 1)
    clean[8_000:] = 0.0
    noisy = clean + speech(1.0, 2).abs().mean() * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    pictures = lips(1.0, 1)
    used = {}
    for aware in (False, True):
        # (4, 5) costs 18 tokens and (16, 2) costs 17.
        found = model.transcribe([clean, noisy], [pictures, pictures], 18, noise_aware=aware)
        used[aware] = [transcript.usage.used for transcript in found]
    assert used == {False: [18, 18], True: [18, 17]}


@given(st.integers(0, 20), st.sampled_from([-5, 0, 5, 10, 20]))
@settings(deadline=None, max_examples=20)
def test_noise_is_measured_in_the_pauses(seed: int, snr: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    voice = torch.randn(32_000, generator=generator)
    voice[16_000:] = 0.0
    noise = torch.randn(32_000, generator=generator) * 10 ** (-snr / 20)
    assert abs(estimate_snr(0.1 * (voice + noise)) - snr) < 2.5
    assert estimate_snr(voice) == 40.0
    assert estimate_snr(voice[:300]) == 40.0


@pytest.fixture(scope="module", params=get_args(Strategy))
def model(request: pytest.FixtureRequest) -> LlamaMtsk:
    # In double precision, as random weights can make much of the last digit of a float.
    return tiny_model(request.param, tasks=ALL).double()
