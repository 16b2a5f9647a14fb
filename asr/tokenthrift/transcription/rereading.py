"""Speech that a recognizer left out of a window: found by the times of its words, and read once more by itself.

Whisper now and then passes over a whole sentence of a window that holds several; the same sentence alone it writes
down. openai-whisper moves its window to the last time it decoded and so only finds what is missing at an end. Here a
second and a half of speech or more without a word over it is cut out, from pause to pause where there are any near, and
read as a window of its own. What it says replaces what was written there if that are more words and not mostly doubtful
ones, joined by `joining` like windows that overlap.

Times by cross-attention cover a recording without gaps: the word before something left out, or the one after, lasts
until its end. So a word that lasts so much longer than anybody needs for it is itself read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription.joining import LETTER_SECONDS, WORD_SECONDS, SpokenWord, division, shifted, spoken_words
from tokenthrift.transcription.results import total_usage
from tokenthrift.transcription.windows import FRAME_SECONDS
from tokenthrift.words import joined_words, parts_words

__all__ = ["LeftOut", "left_out", "with_reread"]

_LEAST_SECONDS: Final = 1.5
_REACH_SECONDS: Final = 1.5
_PAUSE_SECONDS: Final = 0.1
_LEAST_CONFIDENCE: Final = 0.4
# What is left out between two words may make both of them too long.
_SAME_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A stretch of a window that holds speech and no word.

    Attributes:
        start: seconds from the start of the window; where reading again begins.
        end: likewise, where it ends.
        first: the word before which the stretch lies; of all words, how many come before it.
        last: from which word on they come behind it; words between the two are read again.
        bare: seconds from which to which there is no word.
    """

    start: float
    end: float
    first: int
    last: int
    bare: tuple[float, float]


def left_out(transcript: Transcript, speech: NDArray[np.bool_]) -> list[LeftOut]:
    """Where a window holds speech that its transcript does not.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.

    Returns:
        Stretches in order. Their bare parts share nothing; what is read around them may.
    """
    seconds = len(speech) * FRAME_SECONDS
    words = spoken_words(transcript, 0.0, seconds)
    if not words or not all(word.timed and word.tokens for word in words):
        # A window without a word was read and nobody found to speak; the same sound again would be asking for words.
        return []
    found: list[LeftOut] = []
    for first, last, start, end in _bare(words, speech, seconds):
        if found and first <= found[-1].last and start <= found[-1].bare[1] + _SAME_SECONDS:
            first, start = found[-1].first, found.pop().bare[0]
        edges = _edge(speech, start, -1), _edge(speech, end, 1)
        found.append(LeftOut(*edges, first, last, (start, end)))
    return found


def with_reread(transcript: Transcript, gap: LeftOut, reread: Transcript) -> Transcript:
    """The transcript with what reading a stretch again has found, or as it was where that is not more.

    Args:
        transcript: of the window.
        gap: the stretch, of `left_out` for this transcript.
        reread: of the stretch, times from its start.
    """
    same = replace(transcript, usage=total_usage((transcript.usage, reread.usage)))
    reread = shifted(reread, gap.start)
    words = spoken_words(transcript, 0.0, gap.end)
    again = spoken_words(reread, 0.0, gap.end)
    if not all(word.timed and word.tokens for word in again):
        return same
    before, behind = words[: gap.first], words[gap.last :]
    up_to, begin = division(before, again, (gap.start, gap.bare[0]), 0)
    stop, go_on = division(again, behind, (gap.bare[1], gap.end), begin)
    old = len(words) - len(behind[go_on:]) - up_to
    sure = sum(word.confidence for word in again[begin:stop]) >= _LEAST_CONFIDENCE * (stop - begin)
    if stop - begin <= old or not sure:
        return same
    return _spliced(same, (before[:up_to], behind[go_on:]), reread, again[begin:stop])


def _bare(
    words: Sequence[SpokenWord], speech: NDArray[np.bool_], seconds: float
) -> Iterator[tuple[int, int, float, float]]:
    """Words before and behind, start and end of all that is between two words or one word that is too long."""
    at = 0.0
    for index, word in enumerate(words):
        if _spoken(speech, at, word.start) >= _LEAST_SECONDS:
            yield index, index, at, word.start
        needed = WORD_SECONDS + LETTER_SECONDS * len(word.text)
        if _spoken(speech, word.start, word.end) >= needed + _LEAST_SECONDS:
            yield index, index + 1, word.start, word.end
        at = max(at, word.end)
    if _spoken(speech, at, seconds) >= _LEAST_SECONDS:
        yield len(words), len(words), at, seconds


def _spoken(speech: NDArray[np.bool_], start: float, end: float) -> float:
    return float(speech[_frame(start) : _frame(end)].sum()) * FRAME_SECONDS


def _frame(seconds: float) -> int:
    return max(0, round(seconds / FRAME_SECONDS))


def _edge(speech: NDArray[np.bool_], second: float, direction: int) -> float:
    """The middle of the nearest pause before or behind a second, else so far away that whole words are in between."""
    pause = round(_PAUSE_SECONDS / FRAME_SECONDS)
    reach = round(_REACH_SECONDS / FRAME_SECONDS)
    for step in range(reach):
        middle = _frame(second) + direction * step
        start = middle - pause // 2
        if not 0 <= start <= len(speech) - pause:
            break
        if not speech[start : start + pause].any():
            return middle * FRAME_SECONDS
    return float(np.clip(second + direction * _REACH_SECONDS, 0.0, len(speech) * FRAME_SECONDS))


def _spliced(
    transcript: Transcript,
    kept: tuple[Sequence[SpokenWord], Sequence[SpokenWord]],
    reread: Transcript,
    middle: Sequence[SpokenWord],
) -> Transcript:
    """The transcript with words of the reread one between those of its own that are kept before and behind."""
    before, behind = kept
    tokens: list[TranscriptToken] = []
    for source, words in ((transcript, before), (reread, middle), (transcript, behind)):
        for word in words:
            first, *others = source.tokens[word.tokens.start : word.tokens.stop]
            # The first token of a text may have no space before it.
            touches = bool(tokens) and not first.text[:1].isspace() and not tokens[-1].text[-1:].isspace()
            apart = touches and not parts_words(tokens[-1].text[-1:] or " ", word.text[0])
            spaced = f" {first.text}" if apart else first.text
            tokens += [replace(first, text=spaced), *others]
    spoken = (*before, *middle, *behind)
    timed = tuple(Word(word.text, word.start, word.end, word.confidence) for word in spoken)
    return replace(
        transcript,
        text=joined_words(word.text for word in spoken),
        tokens=tuple(tokens),
        words=timed if transcript.words else (),
        alternatives=(),
    )
