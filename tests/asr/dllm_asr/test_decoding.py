"""How encoded recordings become transcripts: samplers, the gate, hotwords, several drafts, certified text, words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torchaudio.functional as audio_functions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.dllm_asr.plain_denoise import denoise
from tests.asr.tiny_dllm import speech, tiny_model, vocabulary
from tokenthrift.backbones.samplers import SAMPLERS, LladaSampler, PriorGuidedSampler
from tokenthrift.budget import BudgetError, DecodeBudget
from tokenthrift.config import ConfigError
from tokenthrift.dllm_asr import DllmAsr, decoding
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy
from tokenthrift.dllm_asr.config import DecodeConfig, SamplerName
from tokenthrift.dllm_asr.draft import CHARACTERS, DraftWord, draft_entropy, draft_words, length_guard
from tokenthrift.dllm_asr.edit_distance import edit_distance, next_distances
from tokenthrift.dllm_asr.hotwords import Hotwords
from tokenthrift.dllm_asr.n_best import by_risk, sampled_drafts
from tokenthrift.dllm_asr.word_times import forced_align, time_tokens, time_words, word_positions
from tokenthrift.media.audio import read_audio
from tokenthrift.transcript import Transcript

ROOT = Path(__file__).resolve().parents[3]
AUDIO = [speech(seconds, seed) for seed, seconds in enumerate([0.5, 1.2, 0.2, 0.8])]
few = settings(deadline=None, max_examples=50)


@pytest.fixture(scope="module")
def encoded(whisper: DllmAsr) -> tuple[Tensor, Tensor]:
    states, lengths = whisper.encode(AUDIO)
    return states, lengths


def alike(ours: list[Transcript], others: list[Transcript]) -> None:
    """Equal but for the last digits of confidences, which the loop rounded otherwise."""
    for one, other in zip(ours, others, strict=True):
        assert (one.text, one.usage) == (other.text, other.usage)
        for mine, theirs in ((one.tokens, other.tokens), (one.words, other.words)):
            assert [(t.text, t.start, t.end) for t in mine] == [(t.text, t.start, t.end) for t in theirs]
            assert [t.confidence for t in mine] == pytest.approx([t.confidence for t in theirs], abs=1e-9)


def by_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding by the oracle in place of `sample`."""

    def plain(predict: Any, canvas: Any, sampler: PriorGuidedSampler, tokens: Any, *, max_rounds: int | None) -> Any:
        return denoise(
            predict,
            canvas.ids,
            canvas.mask,
            mask_id=tokens.mask,
            eos_id=tokens.eos,
            delete_id=tokens.delete,
            budget=DecodeBudget(max_rounds=max_rounds),
            threshold=sampler.threshold,
            prune=sampler.prune or "every",
            verify_threshold=sampler.verify_threshold,
            verify_committed=sampler.verify_committed,
        )

    monkeypatch.setattr(decoding, "sample", plain)


@pytest.mark.parametrize("draft", ["both", "none"])
def test_the_sampler_writes_what_the_loop_wrote(
    whisper: DllmAsr, encoded: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, draft: Any
) -> None:
    ways = [
        DecodeConfig(draft=draft, draft_threshold=0.5, confidence_threshold=0.6, verify_threshold=verify, **more)
        for verify, more in ((0.0, {}), (0.3, {"verify_committed": True, "max_rounds": 4}), (0.2, {"prune": "first"}))
    ]
    ours = [whisper.decode(*encoded, settings=way) for way in ways]
    by_the_plain_loop(monkeypatch)
    for found, way in zip(ours, ways, strict=True):
        alike(found, whisper.decode(*encoded, settings=way))


def test_the_shipped_model_writes_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DllmAsr.from_pretrained(ROOT / "model_cards" / "dllm-asr-tiny-en")
    audio = [read_audio(next(iter(sorted((ROOT / "samples").rglob("*.flac")))))[: 4 * 16_000]]
    ours = model.transcribe(audio)
    by_the_plain_loop(monkeypatch)
    alike(ours, model.transcribe(audio))
    assert ours[0].text


@pytest.mark.parametrize("name", get_args(SamplerName))
def test_every_sampler_decodes(whisper: DllmAsr, encoded: tuple[Tensor, Tensor], name: Any) -> None:
    way = DecodeConfig(sampler=name, draft_threshold=0.9)
    done = whisper.decode(*encoded, settings=way)
    assert len({t.text for t in done}) > 1
    if name in ("prior_guided", "daedal"):  # the others take a fixed number of steps, or one a token
        # Two at a time: one that is done leaves, and the next one enters.
        alike(done, whisper.decode(*encoded, settings=replace(way, max_rows=2)))
    for row, transcript in enumerate(done[:2]):
        n = int(encoded[1][row])
        (alone,) = whisper.decode(encoded[0][row : row + 1, :n], encoded[1][row : row + 1], settings=way)
        assert (alone.text, alone.usage) == (transcript.text, transcript.usage)
    assert set(SAMPLERS) == set(get_args(SamplerName))


def test_a_growing_response_has_the_room_that_its_own_recording_leaves() -> None:
    model = tiny_model("llama").double()
    states = torch.randn(2, 440, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths, words = torch.tensor([440, 60]), ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    drafts = [[DraftWord(word, 0.1, 0.1 * i, 0.1 * i + 0.1) for i, word in enumerate(own)] for own in (["a"], words)]
    way = DecodeConfig(sampler="daedal", draft_threshold=0.5)
    rooms = [model.max_slots(n) for n in lengths.tolist()]
    assert rooms[0] < len(model.canvases(drafts, lengths, way)[1].ids) < rooms[1]
    together = model.decode(states, lengths, settings=way, drafts=drafts)
    for row, n in enumerate(lengths.tolist()):
        here = slice(row, row + 1)
        (alone,) = model.decode(states[here, :n], lengths[here], settings=way, drafts=drafts[here])
        assert (alone.text, alone.usage) == (together[row].text, together[row].usage)


def test_no_recordings_are_no_transcripts_in_each_step(whisper: DllmAsr) -> None:
    states, lengths = whisper.encode([])
    assert (states.shape, lengths.shape) == ((0, 0, 32), (0,))
    for limits in (None, {"certify": "ar"}):
        assert whisper.decode(states, lengths, limits) == []
    with pytest.raises(ConfigError, match="needs decode.active_halo"):
        DecodeConfig(active_refresh=2)


def test_an_active_set_with_halo_is_exact_where_everything_is_read_again(encoded: tuple[Tensor, Tensor]) -> None:
    model = tiny_model("llama").double()
    way = DecodeConfig(draft="confident", draft_threshold=0.9, confidence_threshold=0.5, verify_threshold=0.1)
    expected = model.decode(*encoded, settings=way)
    alike(expected, model.decode(*encoded, settings=replace(way, active_halo=1, active_refresh=1)))
    approximate = model.decode(*encoded, settings=replace(way, active_halo=2))
    assert max(done.usage.rounds or 0 for done in approximate) > 1
    halo = replace(way, active_halo=2)
    for other, refused in ((tiny_model("whisper").double(), halo), (model, replace(halo, sampler="daedal"))):
        with pytest.raises(ValueError, match="reads the memory as a prefix"):
            other.decode(*encoded, settings=refused)


def test_memory_and_prompt_are_read_once_where_they_do_not_see_the_response_and_the_text_is_exact(
    encoded: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").double()
    backbone: Any = model.backbone
    backbone.attention = "prefix"
    run, read = backbone.run, []

    def spy(embeddings: Tensor, *rest: Any) -> Any:
        read.append(embeddings.shape[0] * embeddings.shape[1])
        return run(embeddings, *rest)

    monkeypatch.setattr(backbone, "run", spy)
    way = DecodeConfig(draft="confident", draft_threshold=0.9, confidence_threshold=0.5, verify_threshold=0.1)
    cached = model.decode(*encoded, settings=way)
    once = sum(read)
    assert max(done.usage.rounds or 0 for done in cached) > 2
    read.clear()
    # Nothing is kept, so every round reads memory, prompt and response under the same mask.
    monkeypatch.setattr(backbone, "_done", lambda mask: torch.zeros_like(mask.sum(1)))
    alike(cached, model.decode(*encoded, settings=way))
    assert once < sum(read)


def test_a_sampler_may_be_an_object(whisper: DllmAsr, encoded: tuple[Tensor, Tensor]) -> None:
    way = DecodeConfig(draft="length", extra_slots_at_end=0)
    done = whisper.decode(*encoded, settings=way, sampler=LladaSampler(steps=3))
    assert {t.usage.rounds for t in done} <= {0, 1, 2, 3}
    assert max(t.usage.rounds for t in done) == 3


def test_a_draft_that_is_sure_everywhere_is_not_read(whisper: DllmAsr, encoded: tuple[Tensor, Tensor]) -> None:
    log_p = whisper.draft(*encoded).detach()
    unsure = [draft_entropy(row[:n]) for row, n in zip(log_p, encoded[1].tolist(), strict=True)]
    gate = sorted(unsure)[1]
    plain = whisper.decode(*encoded)
    gated = whisper.decode(*encoded, settings=replace(whisper.config.decode, draft_entropy=gate))
    drafts = whisper.drafts(*encoded)
    for words, entropy, before, after in zip(drafts, unsure, plain, gated, strict=True):
        if entropy <= gate:
            assert after.text == " ".join(word.text for word in words)
            assert after.usage.rounds == 0
            assert [word.confidence for word in after.words] == [word.confidence for word in words]
        else:
            alike([after], [before])  # fewer rows in a batch may change the last digit of a confidence
    uniform = torch.full((3, 29), 1 / 29).log()
    assert draft_entropy(uniform) == pytest.approx(torch.log(torch.tensor(29.0)).item())


@pytest.mark.parametrize("draft", ["ctc", "denoised", "both"])
def test_certified_text_is_the_left_to_right_text(whisper: DllmAsr, encoded: tuple[Tensor, Tensor], draft: Any) -> None:
    vocab = whisper.vocabulary
    limits = [length_guard(words, vocab) for words in whisper.drafts(*encoded)]
    memory, mask = whisper.adapter(*encoded)
    expected = greedy(decoder_of(whisper), memory, mask, vocab, limits)
    way = replace(whisper.config.decode, certify_draft=draft, certify_rejection_prob=0.9)
    done = whisper.decode(*encoded, {"certify": "ar"}, way)
    assert done == whisper.decode(*encoded, settings=replace(way, certify="ar"))
    path = whisper.decode(*encoded, settings=replace(way, certify="ar", sampler="diffuspec"))
    assert [t.text for t in path] == [t.text for t in done]
    for ids, transcript in zip(expected, done, strict=True):
        usage = transcript.usage
        assert transcript.text == vocab.text(ids)
        assert usage.written is not None
        assert usage.accepted is not None
        assert usage.written >= len(ids)
        if draft == "ctc":
            assert usage.written - usage.accepted <= usage.rounds <= usage.written
        assert [token.text for token in transcript.tokens] == [piece for piece in vocab.pieces(ids) if piece]
    assert len({t.text for t in done}) > 2


def test_certified_text_needs_a_causal_reading_and_keeps_to_the_ceiling(whisper: DllmAsr) -> None:
    with pytest.raises(BudgetError, match="bert language model, which has no left-to-right reading"):
        tiny_model("bert").transcribe(AUDIO[:1], decode={"certify": "ar"})
    with pytest.raises(BudgetError, match="certify='beam'"):
        DecodeBudget(certify="beam")  # type: ignore[arg-type]
    short = whisper.transcribe(AUDIO[1:2], decode={"certify": "ar", "max_new_tokens": 2})
    assert len(short[0].tokens) <= 2
    (llama,) = tiny_model("llama").double().transcribe(AUDIO[1:2], decode={"certify": "ar"})
    assert llama.usage.written


def test_hotwords_gain_in_open_slots_only() -> None:
    vocab = vocabulary()
    fox, dog = vocab.word("fox"), vocab.word("dog")
    assert len(fox) > 1
    hotwords = Hotwords(["fox"], vocab, 5.0)
    logits = torch.zeros(1, len(fox) + 2, vocab.size)
    ids = torch.full(logits.shape[:2], vocab.mask_id)
    ids[0, -1] = dog[0]
    out = hotwords.boosted(logits, ids)
    assert not logits.any(), "the input stays"
    assert not out[0, -1].any(), "a slot that is decided"
    assert out[0, :-1, fox[0]].tolist() == [5.0] * (len(fox) + 1)
    assert out[0, 0, fox[1]] == 0, "not without the token before"
    assert out[0, 1, fox[1]] == 5
    for bad in ("", "naïve", "42"):
        with pytest.raises(ValueError, match="cannot be written"):
            Hotwords([bad], vocab, 1.0)
    with pytest.raises(BudgetError, match="a list of words"):
        DecodeBudget(hotwords="fox")  # type: ignore[arg-type]


def test_a_token_that_hotwords_share_gains_once() -> None:
    vocab = vocabulary()
    first, second = vocab.word("fox")[0], vocab.word("fox")[1]
    logits = torch.zeros(1, 4, vocab.size)
    ids = torch.full(logits.shape[:2], vocab.mask_id)
    out = Hotwords(["fox", "Fox", "fox dog", "fox jumps"], vocab, 5.0).boosted(logits, ids)
    assert out[0, :, first].tolist() == [5.0] * 4
    assert float(out[0, 1, second]) == 5.0


def test_hotwords_change_what_is_open_and_nothing_else(whisper: DllmAsr, encoded: tuple[Tensor, Tensor]) -> None:
    way = DecodeConfig(draft="length", hotword_boost=100.0)
    with_words = whisper.decode(*encoded, {"hotwords": ["fox"]}, way)
    assert any("fox" in t.text for t in with_words)
    trusting = DecodeConfig(draft_threshold=0.0, verify_threshold=0.0, extra_slots_at_end=0, hotword_boost=100.0)
    assert whisper.decode(*encoded, {"hotwords": ["fox"]}, trusting) == whisper.decode(*encoded, settings=trusting)


@given(st.lists(st.sampled_from(["a b", "a c", "b", "", "a b c d"]), min_size=1, max_size=8))
@few
def test_the_text_of_least_expected_errors_comes_first(texts: list[str]) -> None:
    order = by_risk(texts)
    assert sorted(texts[p] for p in order) == sorted(set(texts))
    risks = [sum(edit_distance(texts[p].split(), other.split()) for other in texts) for p in order]
    assert risks == sorted(risks)


@given(st.text("ab ", max_size=9), st.text("ab ", max_size=9), st.sampled_from([None, " ", "c"]))
@few
def test_distances_to_every_beginning_are_those_of_the_definition(text: str, draft: str, fixed: str | None) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        one, other = text[i - 1], draft[j - 1]
        costs = 0 if one == other else 2 if fixed in (one, other) else 1
        return min(distance(i - 1, j - 1) + costs, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    found, codes = np.arange(len(draft) + 1), np.array([ord(letter) for letter in draft], dtype=np.int64)
    for count, letter in enumerate(text, 1):
        found = next_distances(found, codes, ord(letter), None if fixed is None else ord(fixed))
        assert found.tolist() == [distance(count, j) for j in range(len(draft) + 1)]
    if fixed is None:
        assert (
            edit_distance(text, draft) == audio_functions.edit_distance(text, draft) == distance(len(text), len(draft))
        )


def test_several_drafts_are_drawn_and_the_safest_text_stays(whisper: DllmAsr, encoded: tuple[Tensor, Tensor]) -> None:
    (log_p,) = whisper.draft(*(part[1:2] for part in encoded)).detach()
    drawn = sampled_drafts(log_p, 6)
    assert drawn[0] == draft_words(log_p)
    assert drawn == sampled_drafts(log_p, 6)
    assert len({tuple(word.text for word in words) for words in drawn}) > 2
    way = replace(whisper.config.decode, n_best=5)
    done = whisper.decode(*encoded, settings=way)
    assert any(t.alternatives for t in done)
    for row, transcript in enumerate(done):
        assert transcript.text not in transcript.alternatives
        n = int(encoded[1][row])
        (alone,) = whisper.decode(encoded[0][row : row + 1, :n], encoded[1][row : row + 1], settings=way)
        assert (alone.text, alone.alternatives) == (transcript.text, transcript.alternatives)


WORDS = st.lists(st.text("ab'C,.", min_size=1, max_size=4), max_size=6)


@given(words=WORDS, frames=st.integers(1, 60), seed=st.integers(0, 999))
@few
def test_words_have_times_that_never_go_back(words: list[str], frames: int, seed: int) -> None:
    log_p = torch.randn(frames, 29, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    timed = time_words(log_p, words, [0.5] * len(words))
    assert [word.text for word in timed] == words
    last = 0.0
    for word in timed:
        assert last <= word.start <= word.end <= frames * 0.02 + 1e-9
        last = word.start
    assert all(a.end <= b.start + 1e-9 for a, b in zip(timed, timed[1:], strict=False))


@given(targets=st.lists(st.integers(1, 3), min_size=1, max_size=8), more=st.integers(0, 20), seed=st.integers(0, 999))
@few
def test_the_alignment_is_that_of_torchaudio(targets: list[int], more: int, seed: int) -> None:
    frames = len(targets) + sum(a == b for a, b in pairwise(targets)) + more
    log_p = torch.randn(frames, 5, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)
    path, scores = audio_functions.forced_align(log_p[None], torch.tensor([targets]))
    expected = [(span.start, span.end) for span in audio_functions.merge_tokens(path[0], scores[0])]
    assert forced_align(log_p.numpy(), targets) == expected


def test_words_are_where_their_letters_are() -> None:
    path = [0, 2, 2, 0, 3, 0, 1, 0, 0, 4, 5, 5, 0, 0]  # "ab cd"
    log_p = (torch.nn.functional.one_hot(torch.tensor(path), 29) * 9.0).log_softmax(-1)
    assert CHARACTERS[1] == "a"
    one, two = time_words(log_p, ["Ab,", "cd"], [0.3, 0.4])
    assert (one.start, one.end, one.confidence) == pytest.approx((0.02, 0.10, 0.3))
    assert (two.start, two.end, two.confidence) == pytest.approx((0.18, 0.24, 0.4))
    pieces = [" a", "b", "", " ", "cd"]
    assert word_positions(pieces) == [0, 0, 0, 0, 1]
    assert time_tokens(pieces, [one, two])[0] == pytest.approx((0.02, 0.04))


def test_words_are_parted_by_any_space_and_a_token_may_write_several() -> None:
    pieces = [" Hello", ".\n", "World", " a b", "\tc"]
    text = "".join(pieces).strip()
    assert word_positions(pieces) == [0, 0, 1, 2, 4]
    response = decoding.Response(text, pieces, [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5], None, 1)
    assert text.split() == ["Hello.", "World", "a", "b", "c"]
    assert decoding._word_confidence(response) == [0.8, 0.7, 0.6, 0.6, 0.5]


def test_a_transcript_has_its_words(whisper: DllmAsr, encoded: tuple[Tensor, Tensor]) -> None:
    for transcript, n in zip(whisper.decode(*encoded), encoded[1].tolist(), strict=True):
        assert " ".join(word.text for word in transcript.words) == " ".join(transcript.text.split())
        assert all(0 <= word.start <= word.end <= n * 0.02 + 1e-9 for word in transcript.words)
        assert all(0 <= word.confidence <= 1 for word in transcript.words)
