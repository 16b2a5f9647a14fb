"""Speech between pauses without a word, sentences read from pause to pause, and what both put into a transcript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.transcription.test_rereading import (
    FRAMES,
    USAGE,
    Spoken,
    doubted,
    forgetful,
    frames,
    read,
    sentences,
    transcript,
)
from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeBudget, DecodeLike, SizeLike, TokenBudget, TokenUsage
from tokenthrift.transcript import Transcript
from tokenthrift.transcription.lips import Streams
from tokenthrift.transcription.reading import Reader, WindowTranscript
from tokenthrift.transcription.rereading import doubtful, left_out
from tokenthrift.transcription.splicing import with_reread


@pytest.mark.parametrize("how", ["nobody", "before", "behind"])
@pytest.mark.parametrize("sentence", range(4))
def test_a_short_sentence_between_pauses_comes_back(how: str, sentence: int) -> None:
    """The word whose time it was given does not last so long that anybody would look."""
    words, seconds = sentences(4, words=3)
    speech = frames(words, seconds)
    found = forgetful(words, range(3 * sentence, 3 * sentence + 3), how, seconds)
    (part,) = left_out(found, speech)
    assert part.first == part.last == 3 * sentence
    assert not speech[round(part.start * FRAMES)]
    assert not speech[round(part.end * FRAMES)]
    whole = with_reread(found, part, read(words, part.start, part.end))
    assert whole.text.split() == [text for text, *_ in words]
    assert "".join(token.text for token in whole.tokens).split() == whole.text.split()


def test_words_at_wrong_times_are_not_written_twice() -> None:
    words, seconds = sentences(4, words=4)
    squeezed = [(text, words[3][1] + i / 50, words[3][1] + (i + 1) / 50) for i, (text, *_) in enumerate(words[4:8], 1)]
    found = transcript([*words[:3], (words[3][0], words[3][1], squeezed[0][1]), *squeezed, *words[8:]])
    (part,) = left_out(found, frames(words, seconds))
    assert with_reread(found, part, read(words, part.start, part.end)).text == found.text
    others = transcript([(f"other{i}", 0.2 + i / 4, 0.4 + i / 4) for i in range(4)])
    assert len(with_reread(found, part, others).text.split()) == len(words) + 4


def test_speech_inside_of_a_sentence_in_doubt_waits_for_the_whole_sentence() -> None:
    words, seconds = sentences(7, words=3)
    speech = frames(words, seconds)
    found = forgetful(words, range(9, 12), "before", seconds)
    marked = [replace(token, text=token.text + "." * (i in (2, 5, 11, 14))) for i, token in enumerate(found.tokens)]
    unsure = [replace(token, confidence=0.5 if 6 <= i < 12 else 0.9) for i, token in enumerate(marked)]
    found = replace(found, text="".join(token.text for token in marked).strip(), tokens=tuple(unsure))
    assert doubtful(found, speech) != []
    assert left_out(found, speech) != []
    assert left_out(found, speech, in_doubt=False) == []


@pytest.mark.parametrize("late", [-0.2, 0.0, 0.3, 0.5])
@pytest.mark.parametrize("sentence", range(5))
def test_a_sentence_in_doubt_is_read_from_pause_to_pause(sentence: int, late: float) -> None:
    """Half a word at an edge spoils a short sentence, and times by cross-attention are often late."""
    words, seconds = sentences(5)
    found = doubted([(text, max(0.0, start + late), end + late) for text, start, end in words], sentence)
    (part,) = doubtful(found, frames(words, seconds))
    first, last = words[6 * sentence], words[6 * sentence + 5]
    assert first[1] - 0.3 <= part.start <= first[1]
    assert last[2] <= part.end <= last[2] + 0.3
    assert with_reread(found, part, read(words, part.start, part.end)).text.replace(".", "") == found.text.replace(
        ".", ""
    )


@given(
    lengths=st.lists(st.lists(st.floats(0.25, 0.6), min_size=5, max_size=10), min_size=4, max_size=6),
    pauses=st.lists(st.floats(0.14, 1.5), min_size=6, max_size=6),
    late=st.floats(-0.2, 0.35),
    unsure=st.sets(st.integers(0, 5), min_size=1),
)
@settings(max_examples=150, deadline=None)
def test_sentences_read_alone_neither_lose_nor_double_a_word(
    lengths: list[list[float]], pauses: list[float], late: float, unsure: set[int]
) -> None:
    words: list[Spoken] = []
    numbers: list[int] = []
    at = 0.3
    for number, (each, pause) in enumerate(zip(lengths, pauses, strict=False)):
        for index, length in enumerate(each):
            words.append((f"s{number}w{index}" + "." * (index == len(each) - 1), at, at + length))
            numbers.append(number)
            at += length
        at += pause
    found = transcript([(text, max(0.0, start + late), end + late) for text, start, end in words])
    sure = [0.5 if number in unsure else 0.9 for number in numbers]
    found = replace(
        found, tokens=tuple(replace(token, confidence=c) for token, c in zip(found.tokens, sure, strict=True))
    )
    for part in reversed(doubtful(found, frames(words, at))):
        found = with_reread(found, part, read(words, part.start, part.end))
    assert found.text.split() == [text for text, *_ in words]


def test_the_same_sound_is_not_read_again() -> None:
    """A recognizer that wrote one word for all of it would write it again."""
    speech = np.ones(12 * FRAMES, dtype=bool)
    found = transcript([("outside.", 0.0, 12.0)])
    assert left_out(found, speech) == []
    (behind,) = left_out(found, speech, behind_word=True)
    assert behind.start > 1.0
    speech[150:160] = speech[300:310] = False
    (part,) = left_out(found, speech)
    assert 3.0 <= part.start <= 3.2


@dataclass
class Lazy:
    """Knows what is said at each second, which its samples are, and stops after one sentence of what it reads again.

    Of a long window it leaves two sentences out, and their time is that of the word before them.
    """

    words: Sequence[Spoken]
    support: BudgetSupport = field(default_factory=lambda: BudgetSupport(fields=frozenset()))
    sample_rate: int = 100
    max_seconds: float = 30.0
    takes_arrays: bool = True
    reads_sentences_alone: bool = False

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        return tuple(USAGE for _ in items)

    def transcribe(
        self, audio: Sequence[Any], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        return [self._read(float(samples[0]), len(samples) / self.sample_rate) for samples in audio]

    def _read(self, start: float, seconds: float) -> Transcript:
        if seconds > 10:
            return forgetful(self.words, range(8, 24), "before", seconds)
        inside = read(self.words, start - 0.005, start + seconds + 0.005)
        said = [(token.text.strip(), token.start or 0.0, token.end or 0.0) for token in inside.tokens]
        first = [word for word in said if word[0][:2] == next(w for w in said if w[0].endswith("w3"))[0][:2]]
        kept = [word for word in said if word[1] <= first[0][1] or word in first]
        return transcript([*kept[:-1], (kept[-1][0], kept[-1][1], seconds)])


@pytest.mark.parametrize("sizes", [[0], [0, 1], [1, 0, 1]])
def test_what_reading_again_leaves_out_is_read_once_more(sizes: list[int]) -> None:
    words, seconds = sentences(4, words=8)
    speech = frames(words, seconds)
    audio = np.asarray(np.arange(round(seconds * 100)) / 100, dtype=np.float32)
    batch = [Streams(audio[: len(audio) // (1 + size)], None) for size in sizes]
    reader = Reader(Lazy(words), TokenBudget(), DecodeBudget(), None, {})
    found = reader.read(batch, [speech[: len(speech) // (1 + size)] for size in sizes])
    for size, result in zip(sizes, found, strict=True):
        assert isinstance(result, WindowTranscript)
        if not size:
            assert result.transcript.text.split() == [text for text, *_ in words]
            assert result.windows == 3
