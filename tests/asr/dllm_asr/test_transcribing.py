"""The laws of transcripts: neither company nor padding changes them, and what drafts and silence may do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.dllm_asr.transcripts import AUDIO, alike, decoding
from tests.asr.tiny_dllm import speech, vocabulary
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.config import DecodeConfig
from tokenthrift.dllm_asr.draft import DraftWord, ctc_log_likelihood
from tokenthrift.whisper import states_of


@pytest.mark.parametrize(
    "settings",
    [
        {"draft": "confident"},
        {"draft": "length"},
        {"draft": "none"},
        {"draft": "both"},
        {"draft": "both", "verify_committed": True, "verify_threshold": 0.3},
    ],
)
def test_transcripts_of_a_batch_are_those_of_each_alone(model: DllmAsr, settings: dict[str, Any]) -> None:
    with decoding(model, draft_threshold=0.5, **settings):
        together = model.transcribe(AUDIO)
        assert len({t.text for t in together}) > 2, "equal texts would prove little"
        for samples, transcript in zip(AUDIO, together, strict=True):
            alike(model.transcribe([samples])[0], transcript)


def test_the_encoder_hears_silence_after_each_recording_and_keeps_none_of_it(model: DllmAsr) -> None:
    plain = model.config
    model.config = replace(plain, encoder=replace(plain.encoder, trailing_silence=0.3))
    try:
        together, lengths = model.encode(AUDIO)
    finally:
        model.config = plain
    assert lengths.tolist() == [states_of(len(a)) for a in AUDIO]
    for row, (samples, n) in enumerate(zip(AUDIO, lengths.tolist(), strict=True)):
        (alone,), _ = model.encode([torch.cat([samples, torch.zeros(4800)])])
        torch.testing.assert_close(together[row, :n], alone[:n], rtol=0, atol=1e-5)
        assert not together[row, n:].any()
    assert (together[0, : lengths[0]] - model.encode(AUDIO[:1])[0][0]).abs().max() > 1e-3


def test_silence_counts_in_the_size_of_a_batch(model: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.dllm_asr.model.BATCH_STATES", 60)
    monkeypatch.setattr(
        model, "config", replace(model.config, encoder=replace(model.config.encoder, trailing_silence=0.3))
    )
    forward: Callable[..., Tensor] = model.encoder.forward
    sizes = list[int]()

    def spied(mels: Tensor, lengths: Tensor) -> Tensor:
        sizes.append(mels.shape[0] * (mels.shape[2] // 2))
        return forward(mels, lengths)

    monkeypatch.setattr(model.encoder, "forward", spied)
    model.transcribe([speech(0.1, seed) for seed in range(9)])
    assert len(sizes) > 1
    assert max(sizes) <= 60


@given(st.permutations(range(len(AUDIO))), st.integers(1, len(AUDIO)))
@settings(deadline=None, max_examples=5)
def test_neither_order_nor_company_matters(whisper: DllmAsr, order: list[int], count: int) -> None:
    whole = whisper.transcribe(AUDIO)
    for i, transcript in zip(order[:count], whisper.transcribe([AUDIO[i] for i in order[:count]]), strict=True):
        alike(transcript, whole[i])


def test_batches_too_large_for_one_pass_are_split(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longest first, each as large as fits; a recording that does not fit goes alone."""
    whole = whisper.transcribe(AUDIO)
    states = [states_of(len(samples)) for samples in AUDIO]
    assert sorted(states) == [1, 10, 15, 25, 25, 40]
    encode: Callable[..., tuple[Tensor, Tensor]] = whisper.encode
    batches = list[list[int]]()

    def spied(audio: list[Tensor]) -> tuple[Tensor, Tensor]:
        batches.append([states_of(len(samples)) for samples in audio])
        return encode(audio)

    monkeypatch.setattr(whisper, "encode", spied)
    for most, expected in (
        (120, [[40, 25, 25], [15, 10, 1]]),
        (60, [[40], [25, 25], [15, 10, 1]]),
        (1, [[40], [25], [25], [15], [10], [1]]),
    ):
        batches.clear()
        monkeypatch.setattr("tokenthrift.dllm_asr.model.BATCH_STATES", most)
        for one, other in zip(whisper.transcribe(AUDIO), whole, strict=True):
            alike(one, other)
        assert batches == expected


def test_padding_is_not_read(model: DllmAsr) -> None:
    states, lengths = (part.clone() for part in model.encode(AUDIO))
    expected = model.decode(states, lengths)
    padding = torch.arange(states.shape[1]) >= lengths[:, None]
    for transcript, other in zip(
        expected, model.decode(states.masked_fill(padding[..., None], torch.nan), lengths), strict=True
    ):
        alike(transcript, other)


def test_transcripts_hold_together(model: DllmAsr) -> None:
    for samples, transcript in zip(AUDIO, model.transcribe(AUDIO), strict=True):
        assert "".join(t.text for t in transcript.tokens).strip() == transcript.text
        assert transcript.text == " ".join(transcript.text.split())
        assert all(0 <= t.confidence <= 1 and t.text for t in transcript.tokens)
        times = [time for t in transcript.tokens for time in (t.start, t.end) if time is not None]
        assert len(times) == 2 * len(transcript.tokens)
        assert all(b >= a - 1e-9 for a, b in zip(times, times[1:], strict=False))
        assert not times or (times[0] >= 0 and times[-1] <= states_of(len(samples)) * 0.02 + 1e-9)


def test_a_draft_without_doubts_is_the_transcript(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode(AUDIO)
    trusting = DecodeConfig(draft_threshold=0.0, verify_threshold=0.0, extra_slots_at_end=0)
    drafts = whisper.drafts(states, lengths)
    for words, transcript in zip(drafts, whisper.decode(states, lengths, settings=trusting), strict=True):
        assert transcript.text == " ".join(w.text for w in words)
        assert transcript.usage.rounds == 0
        assert {t.confidence for t in transcript.tokens} == {w.confidence for w in words}


def test_of_two_responses_the_one_that_the_draft_head_likes_better_stays(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode(AUDIO)
    log_p = whisper.draft(states, lengths).detach()
    one, two, both = (
        whisper.decode(states, lengths, settings=DecodeConfig(draft=draft, draft_threshold=0.01, verify_threshold=0.0))
        for draft in ("confident", "length", "both")
    )
    assert any(a.text != b.text for a, b in zip(one, two, strict=True))
    for i, (a, b, c) in enumerate(zip(one, two, both, strict=True)):
        score = [ctc_log_likelihood(log_p[i, : lengths[i]], t.text) for t in (a, b)]
        best = b if score[1] > score[0] else a
        assert c.text == best.text
        assert [t.start for t in c.tokens] == [t.start for t in best.tokens]
        assert c.usage.rounds == max(a.usage.rounds, b.usage.rounds)


@pytest.mark.parametrize("draft", ["confident", "length", "both", "none"])
def test_words_of_the_draft_cannot_end_the_text(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch, draft: Any) -> None:
    """A denoiser that wants nothing but the end gets it in spare slots only: all of them where there is no draft."""
    forward: Callable[..., Tensor] = whisper.backbone.forward

    def eager(*arguments: Any) -> Tensor:
        logits = forward(*arguments)
        logits[..., vocabulary().eos_id] += 1e3
        return logits

    monkeypatch.setattr(whisper.backbone, "forward", eager)
    states, lengths = whisper.encode(AUDIO)
    transcripts = whisper.decode(states, lengths, settings=DecodeConfig(draft=draft, verify_threshold=0.5))
    assert [bool(t.text) for t in transcripts] == [
        draft != "none" and bool(words) for words in whisper.drafts(states, lengths)
    ]


def test_fast_speech_gives_up_spare_slots_before_words(whisper: DllmAsr) -> None:
    words = [DraftWord("dog", 0.1, i / 8, (i + 1) / 8) for i in range(90)]
    piece, room = len(whisper.vocabulary.word("dog")), whisper.max_slots(500)
    enough = (room - whisper.config.decode.extra_slots_at_end) // piece
    assert enough * (piece + 1) > room, "with one spare slot each they would not fit"
    (canvas,) = whisper.canvases([words[:enough]], torch.tensor([500]), whisper.config.decode)
    assert canvas.hints[: enough * piece] == list(whisper.vocabulary.word("dog")) * enough
    few = whisper.canvases([words[:2]], torch.tensor([500]), whisper.config.decode)[0]
    assert len(few.ids) > 2 * piece + whisper.config.decode.extra_slots_at_end


def test_no_word_in_the_draft_is_silence(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.dllm_asr.model.draft_words", lambda log_p: [])
    (transcript,) = whisper.transcribe([torch.zeros(8000)])
    assert (transcript.text, transcript.tokens, transcript.usage.rounds) == ("", (), 0)
    assert transcript.usage.native == 25
    # Nor is anything written of the drafts that are drawn from its posteriors.
    way = replace(whisper.config.decode, n_best=4)
    (several,) = whisper.decode(*whisper.encode([torch.zeros(8000)]), settings=way)
    assert (several.text, several.alternatives, several.usage.rounds) == ("", (), 0)


def test_only_spare_slots_end_a_text(whisper: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that would end the text at once still writes something for each word of the draft."""
    vocab = whisper.vocabulary
    words = [DraftWord("dog", 0.1, 0.1, 0.2), DraftWord("fox", 0.1, 0.3, 0.4)]
    (token,) = set(vocab.word("a"))
    logits = torch.zeros(vocab.size)
    logits[token], logits[vocab.eos_id] = 20.0, 40.0
    monkeypatch.setattr("tokenthrift.dllm_asr.model.draft_words", lambda log_p: words)
    monkeypatch.setattr(whisper.backbone, "forward", lambda ids, *_: logits.repeat(*ids.shape, 1))
    states, lengths = whisper.encode([speech(1.0, 1)])
    (canvas,) = whisper.canvases([words], lengths, whisper.config.decode)
    (done,) = whisper.decode(states, lengths)
    assert len(done.tokens) == len(canvas.ids) - whisper.config.decode.extra_slots_at_end
    (free,) = whisper.decode(states, lengths, settings=replace(whisper.config.decode, draft="none"))
    assert not free.tokens


@pytest.mark.parametrize("samples", [0, 1, 319, 320, 321])
def test_recordings_may_be_as_short_as_they_like(model: DllmAsr, samples: int) -> None:
    (transcript,) = model.transcribe([speech(0.1)[:samples]])
    assert transcript.usage.native == states_of(samples)
    assert transcript.usage.used == model.plan([transcript.usage.native])[0].used == 1


def test_no_recordings_no_transcripts(whisper: DllmAsr) -> None:
    assert whisper.transcribe([]) == []


def test_thirty_seconds_are_the_longest(whisper: DllmAsr) -> None:
    (transcript,) = whisper.transcribe([torch.zeros(30 * 16_000)])
    assert transcript.usage.native == 1500
    assert whisper.max_seconds == 30


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1600,), torch.nan), "audio 1 holds NaN or infinite samples"),
        (torch.full((1600,), torch.inf), "audio 1 holds NaN or infinite samples"),
        (torch.zeros(30 * 16_000 + 1), r"audio 1 has 30\.00 s, at most 30 s"),
        (torch.zeros(2, 1600), r"audio 1 must be one channel of shape \(samples,\), got \(2, 1600\)"),
        (torch.tensor(0.0), r"audio 1 must be one channel of shape \(samples,\), got \(\)"),
    ],
)
def test_bad_recordings_are_named(whisper: DllmAsr, bad: Tensor, message: str) -> None:
    for call in (whisper.transcribe, whisper.encode):
        with pytest.raises(ValueError, match=message):
            call([speech(0.2), bad, speech(3.0)])
