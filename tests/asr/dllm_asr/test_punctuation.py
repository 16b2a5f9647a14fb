"""Casing and punctuation: labels by alignment, the head on decoder states, and texts that only change in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.tiny_dllm import speech, tiny_config, tiny_model, vocabulary
from tokenthrift.budget import TokenUsage
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.punctuation import CASES, MARKS, PunctuationHead, labels_of, punctuated, word_states, written
from tokenthrift.evaluation.wer import normalize_english
from tokenthrift.transcript import Transcript, TranscriptToken, Word

LOWER, CAPITAL, UPPER, IGNORED = 0, 1, 2, -100


def test_labels_come_from_words_that_both_wrote() -> None:
    reference = "you see mister brown said the nasa man isn't here"
    cases, marks = labels_of(reference, 'You see; Mr. Brown said, the NASA man isn\u2019t here?"')
    assert cases == [CAPITAL, LOWER, IGNORED, CAPITAL, LOWER, LOWER, UPPER, LOWER, LOWER, LOWER]
    assert [MARKS[m] if m >= 0 else None for m in marks] == ["", ",", None, "", ",", "", "", "", "", "?"]


def test_written() -> None:
    assert written("yes i know nasa", [CAPITAL, CAPITAL, LOWER, UPPER], [1, 0, 0, 2]) == "Yes, I know NASA."
    assert written("'tis more", [CAPITAL], [0]) == "'tis more"


words = st.lists(st.from_regex(r"[a-z]{1,7}('[a-z]{1,2})?", fullmatch=True), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(words, st.randoms(use_true_random=False))
def test_the_normalised_text_never_changes(found: list[str], rng: Any) -> None:
    cases = [rng.randrange(len(CASES)) for _ in found]
    marks = [rng.randrange(len(MARKS)) for _ in found]
    text = " ".join(found)
    assert written(text, cases, marks).lower().translate(str.maketrans("", "", ",.?!")) == text
    assert normalize_english(written(text, cases, marks)) == normalize_english(text)


def with_head(family: Any) -> DllmAsr:
    model = tiny_model(family)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        model.punctuation = PunctuationHead(model.config.backbone.hidden_size, 8).eval()
        for part in (model.punctuation.case, model.punctuation.mark):
            part.weight.normal_(std=3.0)
    model.config = replace(model.config, punctuation=8)
    return model


@pytest.mark.parametrize("family", ["whisper", "bert", "llama"])
def test_transcripts_keep_their_words(family: Any, tmp_path: Path) -> None:
    model = with_head(family)
    audio = [speech(1.6), speech(0.7, seed=2), torch.zeros(400)]
    read = model.transcribe(audio)
    model.plain = True
    plain = model.transcribe(audio)
    assert [t.text for t in read] != [t.text for t in plain]
    for one, other in zip(read, plain, strict=True):
        assert one.text.lower().translate(str.maketrans("", "", ",.?!")) == other.text
        assert "".join(token.text for token in one.tokens).strip() == one.text
        assert [t.confidence for t in one.tokens] == [t.confidence for t in other.tokens]
    model.plain = False
    alone = [model.transcribe([clip])[0].text for clip in audio]
    assert alone == [transcript.text for transcript in read], "a row of a batch is that of the row alone"
    model.save_pretrained(tmp_path / "saved")
    loaded = DllmAsr.from_pretrained(tmp_path / "saved").transcribe(audio)
    assert [transcript.text for transcript in loaded] == alone


def test_words_and_alternatives_stay_beside_the_text() -> None:
    model = with_head("whisper")
    tokens = tuple(TranscriptToken(piece, 0.5, 0.0, 1.0) for piece in (" th", "e", " fox"))
    spoken = (Word("the", 0.0, 0.5, 0.9), Word("fox", 0.5, 1.0, 0.8))
    transcript = Transcript("the fox", tokens, TokenUsage(native=5, cap=5, used=5), spoken)
    assert model.punctuation is not None
    memory = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 6, dtype=torch.bool)
    (found,) = punctuated(model.punctuation, model.backbone, model.vocabulary, [transcript], memory, mask)
    assert found.text.split() == [word.text for word in found.words]
    assert "".join(token.text for token in found.tokens).strip() == found.text
    assert [word.start for word in found.words] == [0.0, 0.5]


@pytest.mark.parametrize("family", ["whisper", "llama"])
def test_states_are_those_around_each_word(family: Any) -> None:
    """The head learns the casing of a word from the state before it, and the mark from that of its end."""
    model = tiny_model(family)
    memory = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    states, there = word_states(model.backbone, model.vocabulary, ["the quick fox", "one"], memory, mask)
    assert states.shape == (2, 3, 2, 32)
    assert there.tolist() == [[True, True, True], [True, False, False]]
    # What ends a word stands before the next one.
    assert torch.equal(states[0, 0, 1], states[0, 1, 0])
    alone, _ = word_states(model.backbone, model.vocabulary, ["one"], memory[1:, :4], mask[1:, :4])
    torch.testing.assert_close(alone[0, :1], states[1, :1], rtol=0, atol=1e-4)


def test_a_text_longer_than_the_model_is_left_as_it_is_at_the_end() -> None:
    model = with_head("whisper")
    text = " ".join(["the quick brown fox"] * 60)
    usage = TokenUsage(native=5, cap=5, used=5)
    memory, mask = torch.zeros(1, 6, 32), torch.ones(1, 6, dtype=torch.bool)
    assert model.punctuation is not None
    (found,) = punctuated(
        model.punctuation, model.backbone, model.vocabulary, [Transcript(text, (), usage)], memory, mask
    )
    assert len(found.text.split()) == len(text.split())
    assert found.text.endswith("the quick brown fox")


def test_old_folders_write_plain_text() -> None:
    assert tiny_config("whisper").punctuation is None
    model = DllmAsr(tiny_config("whisper"), vocabulary())
    assert not any(name.startswith("punctuation") for name in model.state_dict())
