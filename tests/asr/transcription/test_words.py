"""Words and their times: from tokens, by forced alignment, and in subtitles that real parsers read."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path

import pysubs2
import pytest
import torch
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.recognizers.tiny_speech import moonshine, wav2vec2
from tests.asr.tiny_dllm import speech
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice
from tokenthrift.budget import BudgetSupport, TokenUsage
from tokenthrift.recognizers import load_transformers
from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription import Segment, Transcriber
from tokenthrift.transcription.alignment import Aligner, align_words, load_aligner
from tokenthrift.transcription.subtitles import READING_CHARACTERS, karaoke, make_cues, srt, vtt
from tokenthrift.words import joined_words, match_tokens, split_words, words_of_tokens

USAGE = TokenUsage(native=1, cap=1, used=1)
LETTERS = {letter: index + 1 for index, letter in enumerate("abcdefgh")}
texts = st.lists(st.text("abcdefgh&<>{}-.", min_size=1, max_size=50), min_size=1, max_size=30)


def test_words_join_tokens() -> None:
    tokens = [
        TranscriptToken(" hel", 0.9, 0.0, 0.2),
        TranscriptToken("lo", 0.4, 0.2, 0.5),
        TranscriptToken(",", 0.8, 0.5, 0.5),
        TranscriptToken(" two words", 0.7, 0.6, 0.9),
    ]
    words = words_of_tokens(tokens)
    assert words[0] == Word("hello,", 0.0, 0.5, 0.4), "as sure as its least sure token"
    assert [word.text for word in words] == ["hello,", "two", "words"]
    assert words_of_tokens([*tokens, TranscriptToken(" x", 1.0)]) == ()


def spoken(text: str, frames: int = 3) -> Tensor:
    """(frames, 9) log-probabilities of a CTC model that hears each letter for some frames, and blanks between."""
    ids = [i for c in text for i in ([LETTERS.get(c, 0)] * frames + [0])]
    p = torch.full((len(ids), 9), 0.01)
    p[torch.arange(len(ids)), torch.tensor(ids)] = 0.92
    return p.log()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (
            ["今天", "天气", "很", "好", "，", "我们", "去", "「", "公园", "」", "。"],
            "今天 天气 很 好， 我们 去 「公园」。",
        ),
        (["コー", "ヒ", "ー", "を", "2", "0", "杯"], "コー ヒー を 20 杯"),
        (["สวัส", "ดี", "ค", "รับ"], "สวัส ดี ค รับ"),
        (["안녕", "하세요", " 여러분"], "안녕하세요 여러분"),
        ([" Don", "'t", " go", "."], "Don't go."),
    ],
)
def test_words_of_scripts_with_and_without_spaces(pieces: list[str], words: str) -> None:
    """In those without a token is a word, and marks stay with the word before them."""
    tokens = [TranscriptToken(piece, 0.9, 0.1 * i, 0.1 * i + 0.1) for i, piece in enumerate(pieces)]
    assert " ".join(word.text for word in words_of_tokens(tokens)) == words
    text = "".join(pieces).strip()
    assert match_tokens(text, tokens)[0] == words.split()
    assert joined_words(words.split()) == text
    assert "".join(split_words(text)) == "".join(text.split())


def test_alignment_finds_the_words() -> None:
    times = align_words(spoken("ab  cd"), ["ab", "CD"], {**LETTERS, **{"C": 3, "D": 4}}, 0, 24 * 0.02)
    assert times == [pytest.approx((0.0, 0.14)), pytest.approx((0.32, 0.46))]
    assert align_words(spoken("ab  cd"), ["ab", "?!", "cd"], LETTERS, 0, 0.48)[1] == pytest.approx((0.14, 0.14))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcdefgh?", min_size=1, max_size=9), max_size=12), st.integers(1, 40), st.floats(0.1, 30))
def test_alignment_is_monotone_and_inside(words: list[str], frames: int, seconds: float) -> None:
    """Also of texts that do not fit, and of silence."""
    log_p = torch.full((frames, 9), 1 / 9).log()
    times = align_words(log_p, words, LETTERS, 0, seconds)
    assert len(times) == len(words)
    at = 0.0
    for start, end in times:
        assert at <= start + 1e-9
        assert start <= end <= seconds + 1e-9
        at = end


class Mute(FakeRecognizer):
    """The recognizer of pitches without times."""

    support = BudgetSupport(fields=frozenset())

    def _read(self, samples: Tensor, limits: object) -> Transcript:
        tokens = (TranscriptToken(" ab", 0.5), TranscriptToken(" cd", 0.25))
        return Transcript("ab cd", tokens, USAGE)


class Ear:
    """A CTC model that hears "ab cd" in whatever it gets."""

    sample_rate, blank = 8_000, 0

    def log_probabilities(self, audio: Sequence[Tensor]) -> Tensor:
        """Of one recording."""
        return spoken("ab  cd")[None]


def test_the_job_aligns_what_has_no_times() -> None:
    samples = (voice(2.0), 16_000)
    plain = Transcriber(Mute()).transcribe(samples)[0]
    assert plain.words == ()
    assert plain.confidence == 0.375
    aligned = Transcriber(Mute(), aligner=Aligner(Ear(), LETTERS)).transcribe(samples)[0]
    assert [(word.text, word.confidence) for word in aligned.words] == [("ab", 0.5), ("cd", 0.25)]
    at = aligned.segments[0].start
    for word in aligned.words:
        assert at <= word.start < word.end <= aligned.segments[0].end
        at = word.end


class Deaf(Ear):
    """An aligner's model that fails on whatever lasts longer than a second and a half."""

    def log_probabilities(self, audio: Sequence[Tensor]) -> Tensor:
        """Of one recording."""
        if len(audio[0]) > 12_000:
            raise RuntimeError("out of memory")
        return super().log_probabilities(audio)


def test_what_cannot_be_aligned_fails_alone() -> None:
    inputs = [(voice(2.0), 16_000), (voice(1.0), 16_000)]
    failed, whole = Transcriber(Mute(), aligner=Aligner(Deaf(), LETTERS)).transcribe(*inputs)
    assert (failed.status, failed.error_type) == ("failed", "RuntimeError")
    assert [word.text for word in whole.words] == ["ab", "cd"]


def test_a_model_of_transformers_aligns(tmp_path: Path) -> None:
    aligner = load_aligner(str(wav2vec2(tmp_path / "ctc")))
    transcript = Transcript("Hello there, you.", (TranscriptToken(" Hello there, you.", 0.5),), USAGE)
    words = aligner.align(speech(2.0), 16_000, transcript)
    assert [word.text for word in words] == ["Hello", "there,", "you."]
    assert all(a.end <= b.start for a, b in zip(words, words[1:], strict=False))
    with pytest.raises(ValueError, match="cannot align"):
        load_aligner(str(moonshine(tmp_path / "moonshine")))
    assert load_transformers(tmp_path / "ctc").transcribe([speech(1.0)])[0].tokens[0].start is not None


@settings(max_examples=40, deadline=None)
@given(texts, st.booleans())
def test_real_parsers_read_the_subtitles(words: list[str], timed: bool) -> None:
    """Whatever the words: as many cues, rising times, all words in order, also word by word."""
    placed = tuple(Word(text, 0.3 * i, 0.3 * i + 0.2, 1.0) for i, text in enumerate(words)) if timed else ()
    segment = Segment(0.0, 0.3 * len(words), " ".join(words), (), USAGE, words=placed)
    cues = make_cues([segment])
    parsed = pysubs2.SSAFile.from_string(srt(cues), format_="srt")
    assert [(event.start, event.end) for event in parsed] == [(cue.start, cue.end) for cue in cues]
    for text in (vtt(cues), karaoke(cues)):
        captions = webvtt.from_buffer(io.StringIO(text)).captions
        assert len(captions) == len(cues)
        shown = html.unescape(" ".join(caption.text for caption in captions))
        assert "".join(shown.split()) == "".join(words)
        at = 0.0
        for caption in captions:
            assert at <= caption.start_in_seconds + 1e-3
            assert caption.start_in_seconds < caption.end_in_seconds + 1e-3
            at = caption.end_in_seconds
    assert all(len(line) <= 42 for cue in cues for line in cue.lines)


def test_karaoke_times_every_word() -> None:
    words = tuple(Word(text, start, start + 0.3, 1.0) for text, start in (("one", 0.5), ("two", 1.0), ("<3", 1.5)))
    text = karaoke(make_cues([Segment(0.5, 2.0, "one two <3", (), USAGE, words=words)]))
    assert "one <00:00:01.000><c>two</c> <00:00:01.500><c>&lt;3</c>" in text


def test_a_cue_stays_for_as_long_as_it_takes_to_read() -> None:
    fast = "a sentence of many words that was said in a second"
    words = tuple(Word(text, 0.1 * i, 0.1 * i + 0.1, 1.0) for i, text in enumerate(fast.split()))
    alone = make_cues([Segment(0.0, 9.0, fast, (), USAGE, words=words)])[0]
    assert alone.end - alone.start == round(1000 * len(fast) / READING_CHARACTERS)
    late = Segment(2.0, 3.0, "next", (), USAGE, words=(Word("next", 2.0, 2.5, 1.0),))
    assert make_cues([Segment(0.0, 1.1, fast, (), USAGE, words=words), late])[0].end == 2000
