"""Transcripts of Llama-MTSK: of a batch as of each alone, beams, coarse to fine, limits, and what cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from tests.asr.talking import SquareFinder, face, write_video
from tests.asr.tiny_mtsk import EOS, around, lips, plan_one, speech, tiny_config, tiny_model
from tests.media_files import voice, write
from tokenthrift.backbones.generation import Generation
from tokenthrift.budget import BudgetError, DecodeBudget, ItemSize
from tokenthrift.cli import main
from tokenthrift.mtsk.config import Strategy
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.transcribing import transcript_of
from tokenthrift.transcript import AudioVisualRecognizer, Transcript

CARD = Path(__file__).resolve().parents[3] / "model_cards" / "mtsk-tiny-en"
ALL = ("avsr", "asr", "vsr")


AUDIO: list[Tensor | None] = [speech(0.7, 1), speech(1.3, 2), None, speech(0.4, 4), speech(0.1, 5)]
VIDEO: list[Tensor | None] = [lips(0.7, 1), None, lips(1.0, 2), lips(0.2, 3), lips(0.12, 5)]


@pytest.fixture(scope="module", params=get_args(Strategy))
def model(request: pytest.FixtureRequest) -> LlamaMtsk:
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
def test_transcripts_of_a_batch_are_those_of_each_alone(model: LlamaMtsk, options: dict[str, Any]) -> None:
    together = model.transcribe(AUDIO, VIDEO, **options)
    assert len({t.text for t in together}) > 2, "equal texts would prove little"
    for audio, video, expected in zip(AUDIO, VIDEO, together, strict=True):
        alike(model.transcribe([audio], [video], **options)[0], expected)
        assert "".join(t.text for t in expected.tokens).strip() == expected.text
        assert expected.usage.used <= expected.usage.cap <= expected.usage.native
    sizes = [
        ItemSize(seconds=None if a is None else len(a) / 16_000, frames=None if v is None else len(v))
        for a, v in zip(AUDIO, VIDEO, strict=True)
    ]
    given = {name: value for name, value in options.items() if name != "noise_aware"}
    plans = model.plan(sizes, **given)
    if options.get("coarse_to_fine"):
        assert all(t.usage.used <= p.used for t, p in zip(together, plans, strict=True))
    else:
        assert list(plans) == [t.usage for t in together]


def test_an_empty_recording_is_an_empty_text_beside_others() -> None:
    model, sound = tiny_model(tasks=ALL), 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    (alone,) = model.transcribe([sound])
    empty, beside = model.transcribe([torch.zeros(0), sound])
    assert (empty.text, empty.tokens, empty.usage.used) == ("", (), 0)
    assert beside.text == alone.text


def test_a_phrase_in_a_circle_is_written_once() -> None:
    """As after the end of a short recording; not at the pace of speech, and not as the published code decodes."""
    model = tiny_model()
    ids = model.token_ids("say" + " hello" * 9)
    circling, usage = Generation(tuple(ids), (0.9,) * len(ids)), model.plan([ItemSize(seconds=1.0, frames=25)])[0]
    found = transcript_of(model, circling, 1.0, usage)
    assert found.text == "say hello"
    assert "".join(token.text for token in found.tokens) == "say hello"
    assert found.usage == usage
    assert transcript_of(model, circling, 9.0, usage).text == "say" + " hello" * 9
    # Nine times would fit into ten seconds, but not beside the other 40 words.
    before, after = " ".join(f"a{chr(97 + i)}" for i in range(20)), " ".join(f"b{chr(97 + i)}" for i in range(20))
    ids = model.token_ids(f"{before}{' in over' * 9} {after}")
    inside = Generation(tuple(ids), (0.9,) * len(ids))
    assert transcript_of(model, inside, 10.0, usage).text == f"{before} in over {after}"
    assert transcript_of(model, inside, 12.0, usage).text == model.text_of(ids)
    model.config = replace(model.config, compat="released")
    assert transcript_of(model, circling, 1.0, usage).text == "say" + " hello" * 9


def test_a_beam_search_gives_each_item_its_own_text() -> None:
    config = tiny_config()
    model = tiny_model(decode=replace(config.decode, tokens_per_second=4)).double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    together = model.transcribe(audio, video, beams=3)
    for one, both in zip(zip(audio, video, strict=True), together, strict=True):
        alike(model.transcribe([one[0]], [one[1]], beams=3)[0], both)
    model.config = replace(config, decode=replace(model.config.decode, beams=3))
    for found, expected in zip(model.transcribe(audio, video), together, strict=True):
        alike(found, expected)
    assert [t.tokens for t in model.transcribe(audio, video, beams=1)] != [t.tokens for t in together]
    for beams in (0, 65):
        with pytest.raises(ValueError, match="from 1 to 64 beams"):
            model.transcribe(audio, video, beams=beams)


@pytest.mark.parametrize("beams", [1, 3])
def test_suppressed_tokens_are_not_written(beams: int) -> None:
    model = tiny_model(decode=replace(tiny_config().decode, beams=beams)).double()
    encoded, rates = model.encode([speech(0.7, 1)], [lips(0.7, 1)]), model.config.scales[0]
    (before,) = model.generate(encoded, rates, [12])
    common = max(before.ids, key=before.ids.count)
    model.config = replace(model.config, decode=replace(model.config.decode, suppress_tokens=(common,)))
    (after,) = model.generate(encoded, rates, [12])
    assert after.ids
    assert common not in after.ids


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_drawn_whatever_the_language_model_would_do(beams: int) -> None:
    model = tiny_model(decode=replace(tiny_config().decode, beams=beams)).double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    expected = model.transcribe(audio, video)
    # As the published Llamas come, but hotter, so that a draw would show.
    lm: Any = model.language_model
    lm.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_k=0, num_beams=5, max_length=3)
    with torch.random.fork_rng(devices=[]):
        for seed in range(3):
            state = torch.manual_seed(seed).get_state()
            for found, unchanged in zip(model.transcribe(audio, video), expected, strict=True):
                alike(found, unchanged)
            assert torch.equal(torch.get_rng_state(), state), "no random number was used"


def test_a_search_finds_what_the_likeliest_tokens_miss() -> None:
    likelihoods = {}
    model = tiny_model().double()
    encoded = model.encode([speech(0.7, 1)], [lips(0.7, 1)])
    for beams in (1, 8):
        (found,) = model.generate(encoded, Rates(4, 2), [6], beams=beams)
        assert len(found.ids) == 6, "no end, so that both texts are of one length"
        likelihoods[beams] = found.confidence
    assert likelihoods[8] > likelihoods[1]


def test_all_video_rates_of_an_audio_rate_continue_one_prefix() -> None:
    model = tiny_model().double()
    encoded = model.encode([speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)])
    read = []
    count: Any = model.language_model.model.register_forward_pre_hook(
        lambda m, a, k: read.append(k["inputs_embeds"].shape[1]), with_kwargs=True
    )
    limits = [1, 1]
    alone = {rates: model.generate(encoded, rates, limits) for rates in model.config.scales}
    apart, read[:] = sum(read), []
    shared = model.generate_all(encoded, model.config.scales, limits)
    count.remove()
    heads = sum(max(len(head) for head in model.blocks(encoded, Rates(a, 2))[0]) for a in (4, 16))
    assert sum(read) < apart - heads + 10
    for rates, texts in alone.items():
        assert [text.ids for text in shared[rates]] == [text.ids for text in texts]
        for one, other in zip(shared[rates], texts, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-9)


def test_coarse_to_fine_pays_for_detail_only_where_it_must() -> None:
    model = tiny_model().double()
    audio, video = [speech(0.7, 1), speech(1.3, 2)], [lips(0.7, 1), lips(1.3, 2)]
    coarse = model.transcribe(audio, video, rates=Rates(16, 5))
    fine = model.transcribe(audio, video, rates=Rates(4, 2))
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
    # On a processor Whisper encodes one recording at a time.
    assert encoded == ["WhisperEncoder", "WhisperEncoder", "AvHubert"], "once for both passes"
    once = DecodeBudget(max_rounds=1, confidence_threshold=1.0)
    assert all(t.usage.rounds == 1 for t in model.transcribe(audio, video, decode=once, coarse_to_fine=True))


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
        plan = plan_one(model.config, 65, 25, cap, coarse_to_fine=ladder)
        assert found.usage.cap == cap
        assert found.usage.used == sum(read) - around(model, plan.first, plan.last.rates) <= cap
        seen.add(plan.last.rates)
    assert len(seen) == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_end_at_their_limit(beams: int) -> None:
    model = tiny_model(decode=replace(tiny_config().decode, max_new_tokens=9, tokens_per_second=0.1, beams=beams))
    for limit, expected in ((None, 9), (3, 3)):
        audio, video = [speech(0.3, 1)], [lips(0.3, 1)]
        (text,) = model.generate(model.encode(audio, video), Rates(4, 2), [expected])
        (found,) = model.transcribe(audio, video, rates=Rates(4, 2), decode=DecodeBudget(max_new_tokens=limit))
        assert len(text.ids) <= expected
        assert EOS not in text.ids
        assert found.text == model.text_of(text.ids)
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
    monkeypatch.setattr("tokenthrift.mtsk.audiovisual.lips._FaceFinder", SquareFinder)
    write(tmp_path / "in" / "sound.wav", voice(2.0))
    write_video(tmp_path / "in" / "both.mkv", np.stack([face()] * 50), samples=torch.from_numpy(voice(2.0)))
    write_video(tmp_path / "in" / "lips.mkv", np.stack([face()] * 50))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "in"), "--model", str(CARD), "--out-dir", str(out), "--format", "json"]
    assert main(["transcribe", *arguments, "--budget", "20"]) == 0
    native = {}
    for path in out.glob("*.json"):
        usage = json.loads(path.read_text())["usage"]
        assert 0 < usage["used"] <= usage["cap"] == 20
        native[path.stem] = usage["native"]
    assert native == {"sound": 100, "both": 150, "lips": 50}


def test_it_is_a_recognizer_of_sound_and_lips() -> None:
    model = tiny_model()
    assert isinstance(model, AudioVisualRecognizer)
    assert model.accepts(audio=True, video=True)
    assert not model.accepts(audio=True, video=False)
    assert tiny_model(tasks=ALL).accepts(audio=False, video=True)
    with pytest.raises(BudgetError, match="nearest legal value: max_tokens=9"):
        model.plan([ItemSize(seconds=1.0, frames=25)], 8)


def test_what_it_cannot_honor_of_a_decoding_is_refused() -> None:
    model = tiny_model()
    for decode, message in (({"certify": "ar"}, "4 beams"), ({"hotwords": ["fox"]}, "hotwords")):
        with pytest.raises(BudgetError, match=message):
            model.transcribe([speech(0.4, 0)], [None], decode=decode, beams=4)
