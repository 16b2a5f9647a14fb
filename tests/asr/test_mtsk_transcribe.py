"""Budgets, rates and transcripts of Llama-MTSK: the laws, the table, coarse to fine, and noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from tests.asr.talking import SquareFinder, face, write_video
from tests.asr.tiny_mtsk import EOS, lips, speech, tiny_config, tiny_model
from tests.media_files import voice, write
from tokenthrift.budget import BudgetError, DecodeBudget, TokenBudget
from tokenthrift.cli import main
from tokenthrift.mtsk.coarse_to_fine import confidence
from tokenthrift.mtsk.config import DecodeConfig
from tokenthrift.mtsk.decoding import Written
from tokenthrift.mtsk.lora import Strategy
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.noise import estimate_snr
from tokenthrift.mtsk.rates import Measured, Rates, price
from tokenthrift.mtsk.sequence import PROMPTS
from tokenthrift.mtsk.transcribing import plan_item
from tokenthrift.transcript import AudioVisualRecogniser, Transcript

CARD = Path(__file__).resolve().parents[2] / "model_cards" / "mtsk-tiny-en"
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
        with pytest.raises(ValueError, match="cannot have"):
            plan_item(config, states, frames, budget)
        return
    try:
        first, plan, tried = plan_item(config, states, frames, budget, coarse_to_fine=ladder)
    except BudgetError as error:
        _, cheapest, _ = plan_item(config, states, frames, TokenBudget(max_tokens=int(str(error.nearest)[11:])))
        offered = [r for r in config.scales if (states or not r.audio) and (frames or not r.video)]
        cap = replace(budget, min_tokens=0).cap(states + frames, max(states / 50, frames / 25))
        assert cheapest.usage.used == min(price(r, states, frames) for r in offered) > cap
        return
    usage = plan.usage
    assert 0 < tried <= usage.used <= usage.cap <= usage.native == states + frames
    assert tried == price(first, states, frames)
    if not ladder:
        assert usage.used == price(plan.rates, states, frames)
    if budget.max_tokens is not None:
        assert usage.used <= budget.max_tokens
        relaxed = replace(budget, max_tokens=budget.max_tokens + 10)
        assert plan_item(config, states, frames, relaxed, coarse_to_fine=ladder)[1].usage.cap >= usage.cap


def test_fields_that_mean_nothing_here_are_refused() -> None:
    with pytest.raises(BudgetError, match="target_error"):
        plan_item(CONFIG, 100, 50, TokenBudget(target_error=0.1))
    with pytest.raises(ValueError, match=r"cannot have rates \(3, 2\)"):
        plan_item(CONFIG, 100, 50, Rates(3, 2))
    with pytest.raises(ValueError, match="cannot have any rates"):
        plan_item(tiny_config(), 100, 0, TokenBudget())
    with pytest.raises(ValueError, match="above 0"):
        Rates(0, 0)
    with pytest.raises(BudgetError, match="coarse_to_fine"):
        tiny_model().transcribe([speech(0.2, 1)], [lips(0.2, 1)], decode=DecodeBudget(confidence_threshold=0.5))


def test_the_table_decides_and_noise_moves_tokens_from_audio_to_video() -> None:
    config = replace(tiny_config(), table=TABLE)

    def chosen(budget: str, snr: float | None = None) -> Rates:
        return plan_item(config, 500, 250, TokenBudget.parse(budget), snr=snr)[1].rates

    assert chosen("100%") == Rates(4, 5), "as good as (4, 2), and cheaper"
    assert chosen("175") == Rates(4, 5)
    assert chosen("174") == Rates(16, 2)
    assert chosen("175", snr=1.0) == Rates(16, 2), "lips are worth more than sound in noise"
    assert chosen("175", snr=25.0) == Rates(4, 5)
    assert plan_item(tiny_config(), 500, 250, TokenBudget())[1].rates == Rates(4, 2), "unmeasured: the most detail"


def test_of_pairs_that_err_alike_the_quicker_is_taken() -> None:
    quick = replace(TABLE[2], milliseconds=9.0)
    slow = replace(TABLE[0], milliseconds=10.0)
    for pair in ((quick, slow), (slow, quick)):
        assert plan_item(replace(tiny_config(), table=pair), 500, 250, TokenBudget())[1].rates == quick.rates
    quick, slow = (replace(line, milliseconds=19.0 - (line.milliseconds or 0)) for line in (quick, slow))
    dearer = plan_item(replace(tiny_config(), table=(quick, slow)), 500, 250, TokenBudget())[1]
    assert dearer.rates == slow.rates, "time counts before tokens"


def test_a_saved_model_brings_its_table_and_hears_when_to_trust_the_lips(tmp_path: Path) -> None:
    tiny_model(table=TABLE).save_pretrained(tmp_path / "model")
    model = LlamaMTSK.from_pretrained(tmp_path / "model")
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
def test_noise_is_heard_in_the_pauses(seed: int, snr: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    voice = torch.randn(32_000, generator=generator)
    voice[16_000:] = 0.0
    noise = torch.randn(32_000, generator=generator) * 10 ** (-snr / 20)
    assert abs(estimate_snr(0.1 * (voice + noise)) - snr) < 2.5
    assert estimate_snr(voice) == 40.0
    assert estimate_snr(voice[:300]) == 40.0


AUDIO: list[Tensor | None] = [speech(0.7, 1), speech(1.3, 2), None, speech(0.4, 4), speech(0.1, 5)]
VIDEO: list[Tensor | None] = [lips(0.7, 1), None, lips(1.0, 2), lips(0.2, 3), lips(0.12, 5)]


@pytest.fixture(scope="module", params=get_args(Strategy))
def model(request: pytest.FixtureRequest) -> LlamaMTSK:
    # In double precision, as random weights can make much of the last digit of a float.
    return tiny_model(request.param, tasks=ALL).double()


def alike(one: Transcript, other: Transcript) -> None:
    assert one.text == other.text
    assert one.usage == other.usage
    assert [t.confidence for t in one.tokens] == pytest.approx([t.confidence for t in other.tokens], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"budget": "25%"}, {"budget": 60, "coarse_to_fine": True}, {"noise_aware": True, "coarse_to_fine": True}],
)
def test_transcripts_of_a_batch_are_those_of_each_alone(model: LlamaMTSK, options: dict[str, Any]) -> None:
    together = model.transcribe(AUDIO, VIDEO, **options)
    assert len({t.text for t in together}) > 2, "equal texts would prove little"
    for audio, video, expected in zip(AUDIO, VIDEO, together, strict=True):
        alike(model.transcribe([audio], [video], **options)[0], expected)
        assert "".join(t.text for t in expected.tokens).strip() == expected.text
        assert expected.usage.used <= expected.usage.cap <= expected.usage.native
    samples = [None if a is None else len(a) for a in AUDIO]
    frames = [None if v is None else len(v) for v in VIDEO]
    given = {name: value for name, value in options.items() if name != "noise_aware"}
    plans = model.plan(samples, frames, **given)
    if options.get("coarse_to_fine"):
        assert all(t.usage.used <= p.usage.used for t, p in zip(together, plans, strict=True))
    else:
        assert [p.usage for p in plans] == [t.usage for t in together]


def test_a_beam_search_gives_each_item_its_own_text() -> None:
    config = tiny_config()
    model = tiny_model(decode=replace(config.decode, beams=3, tokens_per_second=4)).double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    for one, both in zip(zip(audio, video, strict=True), model.transcribe(audio, video), strict=True):
        alike(model.transcribe([one[0]], [one[1]])[0], both)


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_drawn_whatever_the_language_model_would_do(beams: int) -> None:
    assert DecodeConfig().beams == 1, "the likeliest token each time, unless a search is asked for"
    model = tiny_model(decode=replace(tiny_config().decode, beams=beams)).double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    expected = model.transcribe(audio, video)
    # As the published Llamas come, but hotter, so that a draw would show.
    lm: Any = model.language_model
    lm.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_k=0, num_beams=5, max_length=3)
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            state = torch.manual_seed(seed).get_state()
            for found, wanted in zip(model.transcribe(audio, video), expected, strict=True):
                alike(found, wanted)
            assert torch.equal(torch.get_rng_state(), state), "no random number was used"


def test_a_search_finds_what_the_likeliest_tokens_miss() -> None:
    likelihoods = {}
    for beams in (1, 8):
        model = tiny_model(decode=replace(tiny_config().decode, beams=beams)).double()
        encoded = model.encode([speech(0.7, 1)], [lips(0.7, 1)])
        (written,) = model.write(encoded, Rates(4, 2), [6])
        assert len(written.ids) == 6, "no end, so that both texts are of one length"
        likelihoods[beams] = confidence(written)
    assert likelihoods[8] > likelihoods[1]


def test_all_video_rates_of_an_audio_rate_go_on_from_what_was_heard() -> None:
    model = tiny_model().double()
    encoded = model.encode([speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)])
    read = []
    count: Any = model.language_model.model.register_forward_pre_hook(
        lambda m, a, k: read.append(k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    limits = [1, 1]
    alone = {rates: model.write(encoded, rates, limits) for rates in model.config.scales}
    apart, read[:] = sum(read), []
    shared = model.write_all(encoded, model.config.scales, limits)
    count.remove()
    heads = sum(max(len(head) for head in model.blocks(encoded, Rates(a, 2))[0]) for a in (4, 16))
    assert sum(read) < apart - heads + 10
    for rates, written in alone.items():
        assert [w.ids for w in shared[rates]] == [w.ids for w in written]
        for one, other in zip(shared[rates], written, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-9)


def test_coarse_to_fine_pays_for_detail_only_where_it_must() -> None:
    model = tiny_model().double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    coarse = model.transcribe(audio, video, Rates(16, 5))
    fine = model.transcribe(audio, video, Rates(4, 2))
    assert [t.text for t in coarse] != [t.text for t in fine]
    sure = model.transcribe(audio, video, decode=DecodeBudget(confidence_threshold=1e-9), coarse_to_fine=True)
    assert [(t.text, t.usage.used, t.usage.rounds) for t in sure] == [(t.text, t.usage.used, 1) for t in coarse]
    unsure = model.transcribe(audio, video, decode=DecodeBudget(confidence_threshold=1.0), coarse_to_fine=True)
    both = [f.usage.used + c.usage.used for f, c in zip(fine, coarse, strict=True)]
    assert [t.text for t in unsure] == [t.text for t in fine]
    assert [(t.usage.used, t.usage.rounds) for t in unsure] == [(n, 2) for n in both]
    encoded: list[str] = []
    for encoder in (model.audio_encoder, model.video_encoder):
        assert encoder is not None
        encoder.register_forward_hook(lambda m, *_: encoded.append(type(m).__name__))
    model.transcribe(audio, video, decode=DecodeBudget(confidence_threshold=1.0), coarse_to_fine=True)
    assert encoded == ["WhisperEncoder", "AVHubert"], "once for both passes"
    once = DecodeBudget(max_rounds=1, confidence_threshold=1.0)
    assert all(t.usage.rounds == 1 for t in model.transcribe(audio, video, decode=once, coarse_to_fine=True))
    assert confidence(Written((), ())) == 0.0
    assert confidence(Written((1, 2), (0.5, 0.5, 0.5))) == pytest.approx(0.5)


def around(model: LlamaMTSK, first: Rates, last: Rates) -> int:
    """Positions of start, markers and prompt that are read, at one pair of rates or at two one after the other."""

    def head(rates: Rates) -> int:
        return 1 + 2 * bool(rates.audio)

    def tail(rates: Rates) -> int:
        return 2 * bool(rates.video) + len(model.token_ids(PROMPTS[bool(rates.audio), bool(rates.video)]))

    once = head(first) + tail(first)
    if last == first:
        return once
    goes_on = model.config.lora.strategy == "MS" and first.audio == last.audio
    return once + tail(last) + (0 if goes_on else head(last))


@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_the_language_model_reads_what_usage_says_and_no_more_than_the_cap(strategy: Strategy, ladder: bool) -> None:
    model = tiny_model(strategy)
    read: list[int] = []
    lm: Any = model.language_model.model
    lm.register_forward_pre_hook(lambda m, a, k: read.append(k["inputs_embeds"].shape[1]), with_kwargs=True)
    # With one token to write nothing is read after the prompt; a confidence of 1 is never reached.
    decode = DecodeBudget(max_new_tokens=1, confidence_threshold=1.0 if ladder else None)
    audio, video = speech(1.3, 2), lips(1.0, 2)
    seen = set()
    for cap in (10, 18, 25, 30, 35, 90):
        read.clear()
        (found,) = model.transcribe([audio], [video], cap, decode=decode, coarse_to_fine=ladder)
        first, plan, _ = plan_item(model.config, 65, 25, TokenBudget(max_tokens=cap), coarse_to_fine=ladder)
        assert found.usage.cap == cap
        assert found.usage.used == sum(read) - around(model, first, plan.rates) <= cap
        seen.add(plan.rates)
    assert len(seen) == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_end_where_they_are_told_to(beams: int) -> None:
    model = tiny_model(decode=replace(tiny_config().decode, max_new_tokens=9, tokens_per_second=0.1, beams=beams))
    for limit, expected in ((None, 9), (3, 3)):
        audio, video = [speech(0.3, 1)], [lips(0.3, 1)]
        (written,) = model.write(model.encode(audio, video), Rates(4, 2), [expected])
        (found,) = model.transcribe(audio, video, Rates(4, 2), decode=DecodeBudget(max_new_tokens=limit))
        assert len(written.ids) <= expected
        assert EOS not in written.ids
        assert found.text == model.text_of(written.ids)
        assert len(found.tokens) <= expected


@pytest.mark.parametrize(
    ("audio", "video", "problem"),
    [
        ([None], [None], "neither"),
        ([torch.zeros(2, 10)], None, "one channel"),
        ([torch.full((9,), float("nan"))], None, "NaN"),
        ([torch.zeros(500_000)], None, "31.25 s"),
        (None, [torch.zeros(0, 40, 40)], "a frame or more"),
        (None, [torch.zeros(800, 40, 40)], "32.00 s"),
        (None, [torch.zeros(3, 20, 40)], "H and W from 32"),
        (None, [torch.full((3, 40, 40), float("inf"))], "NaN or infinite"),
        ([torch.zeros(9)], [None, None], "1 items of audio but 2"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(audio: Any, video: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        tiny_model(tasks=ALL).transcribe(audio, video)


def test_the_shipped_model_loads_alone_and_keeps_to_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (CARD / "model.safetensors").stat().st_size <= 45e6
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("nothing is fetched"))
    monkeypatch.setattr("tokenthrift.mtsk.lips._FaceFinder", SquareFinder)
    write(tmp_path / "in" / "heard.wav", voice(2.0))
    write_video(tmp_path / "in" / "both.mkv", np.stack([face()] * 50), samples=torch.from_numpy(voice(2.0)))
    write_video(tmp_path / "in" / "seen.mkv", np.stack([face()] * 50))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "in"), "--model", str(CARD), "--out-dir", str(out), "--format", "json"]
    assert main(["transcribe", *arguments, "--budget", "20"]) == 0
    native = {}
    for path in out.glob("*.json"):
        usage = json.loads(path.read_text())["usage"]
        assert 0 < usage["used"] <= usage["cap"] == 20
        native[path.stem] = usage["native"]
    assert native == {"heard": 100, "both": 150, "seen": 50}


def test_it_is_a_recogniser_of_sound_and_lips() -> None:
    model = tiny_model()
    assert isinstance(model, AudioVisualRecogniser)
    assert model.accepts(audio=True, video=True)
    assert not model.accepts(audio=True, video=False)
    assert tiny_model(tasks=ALL).accepts(audio=False, video=True)
    model.check_price(16_000, 25, TokenBudget())
    with pytest.raises(BudgetError, match="nearest legal value: max_tokens=9"):
        model.check_price(16_000, 25, TokenBudget(max_tokens=8))
