"""Speech that a recognizer leaves out of a window and sentences it doubts are read again; nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.media_files import voice
from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeLike, SizeLike, TokenUsage
from tokenthrift.recognizers.precision import OneByOne
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.transcription import Transcriber, sound
from tokenthrift.transcription.rereading import doubtful, left_out
from tokenthrift.transcription.splicing import with_reread
from tokenthrift.words import words_of_tokens

USAGE = TokenUsage(native=4, cap=4, used=4, rounds=1)
FRAMES = 50
Spoken = tuple[str, float, float]


def transcript(words: Sequence[Spoken]) -> Transcript:
    tokens = tuple(TranscriptToken(f" {text}", 0.9, start, end) for text, start, end in words)
    return Transcript(" ".join(text for text, *_ in words), tokens, USAGE)


def frames(words: Sequence[Spoken], seconds: float) -> np.ndarray:
    speech = np.zeros(round(seconds * FRAMES), dtype=bool)
    for _, start, end in words:
        speech[round(start * FRAMES) : round(end * FRAMES)] = True
    return speech


def sentences(count: int, words: int = 6, pause: float = 0.3) -> tuple[list[Spoken], float]:
    """Words of 0.4 s without gaps, a pause behind each sentence; and how long all take."""
    found, at = [], 0.2
    for sentence in range(count):
        for word in range(words):
            found.append((f"s{sentence}w{word}", at, at + 0.4))
            at += 0.4
        at += pause
    return found, at


def read(words: Sequence[Spoken], start: float, end: float) -> Transcript:
    """What a flawless recognizer makes of a part, words that are cut left out."""
    inside = [(text, a - start, b - start) for text, a, b in words if a >= start - 1e-6 and b <= end + 1e-6]
    return transcript(inside)


def forgetful(words: Sequence[Spoken], lost: range, how: str, seconds: float) -> Transcript:
    """Without some words; their time is nobody's, or as cross-attention has it that of the word before or behind."""
    kept = [(text, start, end) for i, (text, start, end) in enumerate(words) if i not in lost]
    at = lost.start
    if how == "before" and at:
        kept[at - 1] = (kept[at - 1][0], kept[at - 1][1], kept[at][1] if at < len(kept) else seconds)
    if how == "behind" and at < len(kept):
        kept[at] = (kept[at][0], kept[at - 1][2] if at else 0.0, kept[at][2])
    return transcript(kept)


@pytest.mark.parametrize("how", ["nobody", "before", "behind"])
@pytest.mark.parametrize("sentence", range(4))
def test_a_sentence_that_is_left_out_comes_back(how: str, sentence: int) -> None:
    words, seconds = sentences(4)
    speech = frames(words, seconds)
    found = forgetful(words, range(6 * sentence, 6 * sentence + 6), how, seconds)
    (gap,) = left_out(found, speech)
    assert gap.start <= words[6 * sentence][1]
    assert gap.end >= words[6 * sentence + 5][2] - 1e-6
    whole = with_reread(found, gap, read(words, gap.start, gap.end))
    assert whole.text.split() == [text for text, *_ in words]
    assert "".join(token.text for token in whole.tokens).split() == whole.text.split()
    starts = [token.start or 0.0 for token in whole.tokens]
    assert starts == sorted(starts)
    assert whole.usage.used == 2 * USAGE.used


@pytest.mark.parametrize("sentence", range(4))
def test_words_come_back_where_an_aligner_gives_their_times(sentence: int) -> None:
    words, seconds = sentences(4)

    def aligned(found: Transcript) -> Transcript:
        tokens = tuple(TranscriptToken(token.text, token.confidence) for token in found.tokens)
        return replace(found, tokens=tokens, words=words_of_tokens(found.tokens))

    found = aligned(forgetful(words, range(6 * sentence, 6 * sentence + 6), "before", seconds))
    (gap,) = left_out(found, frames(words, seconds))
    whole = with_reread(found, gap, aligned(read(words, gap.start, gap.end)))
    assert whole.text.split() == [text for text, *_ in words]
    assert [word.start for word in whole.words] == pytest.approx([start for _, start, _ in words])


def test_a_first_token_without_a_space_stays_a_word_of_its_own() -> None:
    words, seconds = sentences(2)
    found = transcript(words[6:])
    # It begins in the pause before its word, as times by cross-attention do, so the pause ends what is read again.
    first = replace(found.tokens[0], text="s1w0", start=words[5][2] + 0.05)
    found = replace(found, tokens=(first, *found.tokens[1:]))
    (gap,) = left_out(found, frames(words, seconds))
    whole = with_reread(found, gap, read(words, gap.start, gap.end))
    assert whole.text.split() == [text for text, *_ in words]
    assert "".join(token.text for token in whole.tokens).split() == whole.text.split()


@given(
    lengths=st.lists(st.floats(0.15, 0.7), min_size=14, max_size=40),
    lost=st.tuples(st.floats(0, 1), st.integers(4, 12)),
    how=st.sampled_from(["nobody", "before", "behind"]),
    pauses=st.lists(st.booleans(), min_size=40, max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_any_stretch_comes_back_and_no_word_is_doubled(
    lengths: list[float], lost: tuple[float, int], how: str, pauses: list[bool]
) -> None:
    steps = [0.0, *(length + 0.25 * pause for length, pause in zip(lengths, pauses, strict=False))]
    words = [(f"w{i}", at, at + length) for i, (at, length) in enumerate(zip(accumulate(steps), lengths, strict=False))]
    seconds = words[-1][2] + 0.2
    speech = frames(words, seconds)
    begin = round(lost[0] * (len(words) - lost[1]))
    missing = range(begin, begin + lost[1])
    found = forgetful(words, missing, how, seconds)
    gaps = left_out(found, speech)
    for gap in reversed(gaps):
        found = with_reread(found, gap, read(words, gap.start, gap.end))
    texts = found.text.split()
    assert len(set(texts)) == len(texts)
    assert texts == [text for text, *_ in words if text in texts]
    if sum(lengths[i] for i in missing) > 3.0:
        assert texts == [text for text, *_ in words]


def test_what_is_whole_is_not_read_again() -> None:
    words, seconds = sentences(4)
    assert left_out(transcript(words), frames(words, seconds)) == []
    assert left_out(transcript(words[:-2]), frames(words, seconds)) == [], "0.8 s"
    slow = [("really", 0.0, 1.9)]
    assert left_out(transcript(slow), frames(slow, 2.0)) == [], "a word may be drawn out"
    assert left_out(transcript(words[:6]), frames(words[:6], seconds)) == [], "nobody speaks behind them"
    assert left_out(transcript([]), frames(words, seconds)) == [], "nor is what the recognizer calls silence"
    untimed = Transcript("s0w0 s0w1", (TranscriptToken(" s0w0", 1.0), TranscriptToken(" s0w1", 1.0)), USAGE)
    assert left_out(untimed, frames(words, seconds)) == []


def test_fewer_or_doubtful_words_change_nothing_but_the_cost() -> None:
    words, seconds = sentences(3)
    found = forgetful(words, range(6, 12), "before", seconds)
    (gap,) = left_out(found, frames(words, seconds))
    again = read(words, gap.start, gap.end)
    doubted = replace(again, tokens=tuple(replace(token, confidence=0.2) for token in again.tokens))
    for other in (transcript([]), doubted):
        same = with_reread(found, gap, other)
        assert (same.text, same.tokens) == (found.text, found.tokens)
        assert same.usage.native == 2 * USAGE.native


def test_a_sentence_comes_back_whose_time_two_words_share() -> None:
    """Neither of them alone is so long that anybody would look."""
    words, seconds = sentences(4, words=8)
    two = [("I", words[8][1], words[12][1]), ("was", words[12][1], words[16][1])]
    found = transcript([*words[:8], *two, *words[16:]])
    (part,) = left_out(found, frames(words, seconds))
    assert (part.first, part.last, part.bare) == (8, 10, (words[8][1], words[16][1]))
    whole = with_reread(found, part, read(words, part.start, part.end))
    assert whole.text.split() == [text for text, *_ in words]


def test_words_squeezed_between_two_that_are_too_long_are_read_again_with_them() -> None:
    words, seconds = sentences(4, words=10)
    start, end = words[10][1], words[19][2]
    four = [("it", start, start + 2.2), ("was", start + 2.2, start + 2.3), ("I", start + 2.3, start + 2.4)]
    found = transcript([*words[:10], *four, ("who", start + 2.4, end), *words[20:]])
    (part,) = left_out(found, frames(words, seconds))
    assert (part.first, part.last) == (10, 14)


def test_what_is_behind_a_word_is_read_where_the_word_alone_came_back() -> None:
    words, seconds = sentences(4, words=8)
    found = forgetful(words, range(9, 16), "before", seconds)
    (whole,) = left_out(found, frames(words, seconds))
    (behind,) = left_out(found, frames(words, seconds), behind_word=True)
    assert (whole.first, whole.last, behind.first, behind.last) == (8, 9, 9, 9)
    assert whole.bare[0] < words[8][2] < behind.bare[0]
    assert with_reread(found, whole, read(words[:9], whole.start, whole.end)).text == found.text
    text = with_reread(found, behind, read(words, behind.start, behind.end)).text.split()
    assert text[:9] == found.text.split()[:9]
    assert len(text) > len(found.text.split()) + 3
    assert left_out(transcript(words), frames(words, seconds), behind_word=True) == []
    silent = forgetful(words, range(8, 16), "nobody", seconds)
    assert left_out(silent, frames(words, seconds), behind_word=True) == [], "that was read already"


def doubted(words: Sequence[Spoken], sentence: int, confidence: float = 0.5) -> Transcript:
    """Sentences of six words, all but one of them sure, with a mark behind each."""
    marked = [(f"{text}{'.' * (i % 6 == 5)}", start, end) for i, (text, start, end) in enumerate(words)]
    made = transcript(marked)
    inside = range(6 * sentence, 6 * sentence + 6)
    tokens = [replace(token, confidence=confidence if i in inside else 0.9) for i, token in enumerate(made.tokens)]
    return replace(made, tokens=tuple(tokens))


@pytest.mark.parametrize("pause", [0.0, 0.3])
@pytest.mark.parametrize("sentence", range(5))
def test_a_sentence_in_doubt_is_read_alone(sentence: int, pause: float) -> None:
    words, seconds = sentences(5, pause=pause)
    found = doubted(words, sentence)
    (part,) = doubtful(found, frames(words, seconds))
    assert (part.first, part.last) == (6 * sentence, 6 * sentence + 6)
    assert part.confidence == pytest.approx(0.5)
    others = [word for i, word in enumerate(words) if i // 6 != sentence]
    assert all(end <= part.start + 1e-6 or start >= part.end - 0.5 for _, start, end in others), "no word beside it"
    spoken = [(f"again{i}", start - part.start, end - part.start) for i, (_, start, end) in enumerate(words)]
    reread = transcript(spoken[part.first : part.last])
    whole = with_reread(found, part, replace(reread, tokens=tuple(replace(t, confidence=0.42) for t in reread.tokens)))
    wanted = [f"again{i}" if i in range(part.first, part.last) else word for i, word in enumerate(found.text.split())]
    assert whole.text.split() == wanted
    assert "".join(token.text for token in whole.tokens).split() == wanted
    unsure = replace(reread, tokens=tuple(replace(token, confidence=0.38) for token in reread.tokens))
    short = transcript(spoken[part.first : part.first + 2])
    again = [
        (f"again{i}", part.bare[0] - part.start + i / 8, part.bare[0] - part.start + (i + 1) / 8) for i in range(16)
    ]
    for other in (unsure, short, transcript(again), transcript([])):
        assert with_reread(found, part, other).text == found.text


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_sentences_that_end_and_begin_with_one_word_keep_both(pause: float, more: int) -> None:
    """Also where a word more of the next one was read with them, which is joined to it."""
    words, seconds = sentences(5, pause=pause)
    words = [("red" if i in (11, 12, 17, 18) else text, start, end) for i, (text, start, end) in enumerate(words)]
    found = doubted(words, 1)
    tokens = [replace(token, confidence=0.5) if i in range(6, 24) else token for i, token in enumerate(found.tokens)]
    whole = found = replace(found, tokens=tuple(tokens))
    parts = doubtful(found, frames(words, seconds))
    assert [part.first for part in parts] == [6, 12, 18]
    for part in reversed(parts):
        own = words[part.first : part.last + more]
        whole = with_reread(whole, part, transcript([(w, a - part.start, b - part.start) for w, a, b in own]))
    assert whole.text.replace(".", "").split() == found.text.replace(".", "").split()
    assert whole.usage.used > found.usage.used


def test_sure_sentences_short_windows_and_a_sentence_alone_are_not_read_again() -> None:
    words, seconds = sentences(5)
    assert doubtful(doubted(words, 2, 0.8), frames(words, seconds)) == []
    words, seconds = sentences(3)
    assert seconds < 10
    assert doubtful(doubted(words, 1), frames(words, seconds)) == []
    words, seconds = sentences(1, words=26)
    low = transcript(words)
    low = replace(low, tokens=tuple(replace(token, confidence=0.3) for token in low.tokens))
    assert seconds > 10
    assert doubtful(low, frames(words, seconds)) == [], "the same sound again would say the same"


@given(
    times=st.lists(st.tuples(st.floats(-2, 16), st.floats(-1, 5)), min_size=1, max_size=12),
    rises=st.booleans(),
    confidence=st.sampled_from([0.2, 1.0]),
    voiced=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_odd_times_ask_for_no_part_that_is_not_there(
    times: list[tuple[float, float]], rises: bool, confidence: float, voiced: bool
) -> None:
    """Of a model whose times go back, leave the window or last for nothing: an empty part would fail its recording."""
    order = sorted(times) if rises else times
    found = transcript([(f"w{i}" + "." * (i % 2), at, at + length) for i, (at, length) in enumerate(order)])
    found = replace(found, tokens=tuple(replace(token, confidence=confidence) for token in found.tokens))
    speech = np.full(12 * FRAMES, voiced)
    parts = [*left_out(found, speech), *left_out(found, speech, in_doubt=False), *doubtful(found, speech)]
    assert all(0 <= part.start < part.end <= 12 for part in parts)
    assert all(0 <= part.first <= part.last <= len(order) for part in parts)


def test_times_that_go_back_are_left_alone() -> None:
    found = transcript([("late", 9.0, 11.0), ("early", 3.0, 5.5)])
    speech = np.ones(12 * FRAMES, dtype=bool)
    assert left_out(found, speech) == doubtful(found, speech) == []


@dataclass
class Forgetful:
    """Writes `a`, `b`, ... for each half second, and in what is longer than ten seconds none from the third to sixth.

    Of a window it knows the loudness, which rises with the clock of the recording, and so where it comes from.
    """

    support: BudgetSupport = field(default_factory=lambda: BudgetSupport(fields=frozenset({"max_tokens"})))
    sample_rate: int = 16_000
    max_seconds: float = 30.0
    fails_below: float = 0.0
    calls: list[list[float]] = field(default_factory=list)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        return tuple(USAGE for _ in items)

    def transcribe(
        self, audio: Sequence[Tensor], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        self.calls.append([len(samples) / self.sample_rate for samples in audio])
        if any(len(samples) < self.fails_below * self.sample_rate for samples in audio):
            raise RuntimeError("out of memory")
        return [self._read(samples) for samples in audio]

    def _read(self, samples: Tensor) -> Transcript:
        seconds = len(samples) / self.sample_rate
        words = []
        for i in range(int(2 * seconds)):
            part = samples[8_000 * i : 8_000 * (i + 1)]
            if float(part.abs().max()) > 0.01 and not (seconds > 10 and 3 <= i / 2 < 6):
                words.append((f"l{round(1000 * float(part.square().mean().sqrt()))}", i / 2, i / 2 + 0.5))
        return transcript(words)


@pytest.fixture(autouse=True)
def energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its voices are tones, which Silero VAD does not take for speech."""
    monkeypatch.setattr(sound, "load_vad", lambda: None)


def rising(seconds: float) -> np.ndarray:
    """A voice that gets louder, with a short pause every three seconds."""
    samples = voice(seconds) * np.linspace(0.2, 1.0, round(16_000 * seconds), dtype=np.float32)
    for at in range(3, int(seconds), 3):
        samples[16_000 * at - 3_200 : 16_000 * at] = 0
    return np.asarray(samples, dtype=np.float32)


def test_the_job_reads_again_and_a_text_does_not_depend_on_its_batch() -> None:
    long, short = rising(12.0), rising(4.0)
    model = Forgetful()
    (alone,) = Transcriber(model).transcribe((long, 16_000))
    assert alone.windows == 2
    assert len(model.calls) == 2
    assert 3.0 <= model.calls[1][0] <= 5.0
    assert len(alone.words) >= 22
    assert [word.start for word in alone.words] == sorted(word.start for word in alone.words)
    for seconds in (1.0, 20.0, 500.0):
        order = [(short, 16_000), (long, 16_000), (short, 16_000), (long, 16_000)]
        results = Transcriber(Forgetful(), batch_seconds=seconds).transcribe(*order)
        assert {results[1].text, results[3].text} == {alone.text}
        assert results[1].words == alone.words
        assert results[0].windows == 1


class Unsure(Forgetful):
    """Doubts the second of four sentences of a long window, and is sure of what it reads alone."""

    def _read(self, samples: Tensor) -> Transcript:
        seconds = len(samples) / self.sample_rate
        if seconds < 10:
            return transcript([("alone", 0.1, seconds - 0.1)])
        return doubted([(f"w{i}", i / 2, i / 2 + 0.5) for i in range(24)], 1)


@pytest.mark.parametrize("alone", [False, True])
def test_only_a_recognizer_that_gains_by_it_reads_sentences_alone(alone: bool) -> None:
    model: Any = Unsure()
    model.reads_sentences_alone = alone
    (result,) = Transcriber(model).transcribe((rising(12.0), 16_000))
    assert (result.windows, len(model.calls)) == ((2, 2) if alone else (1, 1))
    assert ("alone" in result.text) is False, "one word does not replace six"
    (short,) = Transcriber(OneByOne(model)).transcribe((rising(12.0), 16_000))
    assert short.windows == result.windows


def test_limits_of_a_window_are_kept() -> None:
    for options in ({"budget": 64}, {"decode": {"max_new_tokens": 9}}):
        model = Forgetful()
        (result,) = Transcriber(model, **options).transcribe((rising(12.0), 16_000))
        assert (result.windows, len(model.calls)) == (1, 1)


def test_a_part_that_cannot_be_read_again_fails_its_recording_alone() -> None:
    """Half a text that passes for a whole one would be worse."""
    inputs = [(rising(12.0), 16_000), (rising(8.0), 16_000)]
    broken, whole = Transcriber(Forgetful(fails_below=6.0)).transcribe(*inputs)
    assert (broken.status, broken.error_type) == ("failed", "RuntimeError")
    assert whole.status == "completed"
