"""Parts of a window that are read once more by themselves: speech that was left out, and sentences in doubt.

Whisper now and then passes over a whole sentence of a window that holds several, and transcribes the same sentence
alone. openai-whisper moves its window to the last time it decoded and so only finds what is missing at an end. Here a
second and a half of speech or more without a word over it is cut out, from pause to pause where there are any near, and
read as a window of its own; `splicing` puts what was found into the transcript.

Times by cross-attention cover a recording without gaps: the word before something left out, or the one after, lasts
until its end. So words in a row that together last a second and a half longer than they need are themselves read
again. Where that brings nothing, what is behind the first of them is read, as Whisper may stop after it. And speech of
0.8 s or more from one pause to the next, in which no word begins, is read again too, however long a word covers it.

Where speakers follow each other, Whisper transcribes a sentence worse in a window of several than alone. So a sentence
of a window of ten seconds or more whose words have a mean confidence below 0.75 is read alone. Times by cross-attention
are wrong by up to half a second, and half a word at an edge spoils a short sentence. So it is read from the longest
pause near its first word to the longest one near the first word behind it.

All numbers were chosen on development data (`docs/transcription.md`). A recognizer says whether it gains by reading
sentences alone (`reads_sentences_alone`). openai-whisper instead reads the whole of a doubtful window again, at a
higher temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift.spoken_words import SpokenWord, spoken_words
from tokenthrift.transcript import Transcript
from tokenthrift.transcription.joining import LETTER_SECONDS, WORD_SECONDS
from tokenthrift.transcription.windows import FRAME_SECONDS, MARGIN_SECONDS, SHORT_PAUSE_SECONDS
from tokenthrift.words import ends_sentence

__all__ = ["Part", "doubtful", "frame", "left_out", "timed_words"]

_LEAST_SECONDS: Final = 1.5
_TOO_LONG_SECONDS: Final = 0.3
_SQUEEZED_SECONDS: Final = 0.5
_REACH_SECONDS: Final = 0.5
_TIME_ERROR_SECONDS: Final = 0.1
_PAUSE_SECONDS: Final = 0.1
# Two parts so near each other are one: what is left out between two words may make both of them too long.
_SAME_SECONDS: Final = 0.5

# A boundary by words is mostly late, as attention leaves a pause to the word before it.
_LATE_SECONDS: Final = 0.6
_EARLY_SECONDS: Final = 0.3
_LEAST_PART_SECONDS: Final = 0.3

# Speech from pause to pause, in which a word is taken to begin that begins so shortly before it.
_LEAST_RUN_SECONDS: Final = 0.8
_RUN_ERROR_SECONDS: Final = 0.2
# Two runs of speech without a word are one part where the pause between them is shorter.
_ONE_PART_SECONDS: Final = 1.0
_LEAST_WORD_SECONDS: Final = 0.1

_LEAST_WINDOW_SECONDS: Final = 10.0
_LEAST_SENTENCE_SECONDS: Final = 0.8
_DOUBT: Final = 0.75


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a window that is to be read again.

    Attributes:
        start: seconds from the start of the window; where reading again begins.
        end: likewise, where it ends.
        first: index of its first word, or of the word behind it where it has none.
        last: index of the first word behind it; the words from `first` up to `last` are read again.
        bare: start and end in seconds of its words, or of the speech where it has none.
        confidence: mean over its words; None where speech was left out.
    """

    start: float
    end: float
    first: int
    last: int
    bare: tuple[float, float]
    confidence: float | None = None


def left_out(
    transcript: Transcript, speech: NDArray[np.bool_], *, in_doubt: bool = True, behind_word: bool = False
) -> list[Part]:
    """Where a window holds speech that its transcript does not.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.
        in_doubt: also find speech in which no word begins inside of sentences that `doubtful` finds.
        behind_word: only find words in a row that last too long, and leave the first of them out of each part, as a
            recognizer may stop after the word with which a part begins.

    Returns:
        Parts in order. Their bare spans share nothing; what is read around them may.
    """
    seconds = len(speech) * FRAME_SECONDS
    words = timed_words(transcript, seconds)
    if not words:
        # The window was read and had no word; reading the same sound again would only invite invented ones.
        return []
    found: list[Part] = []
    for first, last, start, end in _bare(words, speech, seconds):
        if behind_word:
            if first == last:
                continue
            start, first = start + _needed(words[first]), first + 1
            if _spoken(speech, start, end) < _LEAST_SECONDS:
                continue
        if found and first <= found[-1].last and start <= found[-1].bare[1] + _SAME_SECONDS:
            first, start = found[-1].first, found.pop().bare[0]
        edges = _edge(speech, start, -1), _edge(speech, end, 1)
        found.append(Part(*edges, first, last, (start, end)))
    # The same sound again would say the same.
    found = [part for part in found if part.start > _TIME_ERROR_SECONDS or part.end < seconds - _TIME_ERROR_SECONDS]
    if behind_word:
        return found
    unsure = [] if in_doubt else doubtful(transcript, speech)
    found += [
        part
        for part in _wordless(words, speech)
        if all(_apart(part, other) for other in found)
        and not any(other.first < part.first < other.last for other in unsure)
    ]
    return sorted(found, key=lambda part: (part.first, part.bare))


def _wordless(words: Sequence[SpokenWord], speech: NDArray[np.bool_]) -> Iterator[Part]:
    """Speech from pause to pause in which no word begins."""
    pauses = _pauses(speech)
    runs: list[tuple[int, int, int]] = []  # index of the word behind it, and of the pauses before and behind it
    for number, ((_, start), (end, _)) in enumerate(pairwise(pauses)):
        inside = start - _RUN_ERROR_SECONDS, end - _TIME_ERROR_SECONDS
        if end - start < _LEAST_RUN_SECONDS or any(inside[0] < word.start < inside[1] for word in words):
            continue
        index = sum(word.start < start for word in words)
        if runs and runs[-1][0] == index and start - pauses[runs[-1][2]][0] < _ONE_PART_SECONDS:
            runs[-1] = index, runs[-1][1], number + 1
        else:
            runs.append((index, number, number + 1))
    at = 0.0
    for index, first, last in runs:
        start, end = _begin(pauses[first]), _stop(pauses[last])
        if start < at:
            continue
        if index:
            word, run = words[index - 1], (pauses[first][1], pauses[last][0])
            if _spoken(speech, run[1], word.end) >= _LEAST_WORD_SECONDS:
                # The word lasts from before the run until behind it, and was said at one of the two.
                if _spoken(speech, word.start, run[0]) < _LEAST_WORD_SECONDS:
                    index -= 1
                else:
                    end = max(end, _edge(speech, word.end, 1))
        yield Part(start, end, index, index, (start, end))
        at = end


def _apart(part: Part, other: Part) -> bool:
    """Whether two parts share neither words nor time."""
    before = part.first <= other.first and part.bare[1] <= other.bare[0]
    return before or part.first >= other.last and part.bare[0] >= other.bare[1]


def doubtful(transcript: Transcript, speech: NDArray[np.bool_]) -> list[Part]:
    """Sentences that the recognizer is not sure of, in a long window that holds others besides.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.

    Returns:
        Parts in order; what is read around a sentence reaches at most half a second into the word behind it.
    """
    seconds = len(speech) * FRAME_SECONDS
    words = timed_words(transcript, seconds)
    if seconds < _LEAST_WINDOW_SECONDS or not words:
        return []
    pauses = _pauses(speech)
    found: list[Part] = []
    for first, last in _sentences(words):
        confidence = sum(word.confidence for word in words[first:last]) / (last - first)
        start, end = max(words[first].start, 0.0), min(words[last - 1].end, seconds)
        alone = last - first == len(words)
        if confidence >= _DOUBT or end - start < _LEAST_SENTENCE_SECONDS or alone:
            continue
        before = words[first - 1].end if first else 0.0
        # Times by attention end a word too soon rather than too late.
        behind = words[last].start + _REACH_SECONDS if last < len(words) else seconds
        part = Part(
            min(max(_edge(speech, start, -1), before), start),
            max(min(_edge(speech, end, 1), behind), end),
            first,
            last,
            (start, end),
            confidence,
        )
        found.append(_between_pauses(part, words, pauses) if pauses else part)
    return found


def _between_pauses(part: Part, words: Sequence[SpokenWord], pauses: Sequence[tuple[float, float]]) -> Part:
    """The part from pause to pause as far as there is one at its ends; its bare span ends where reading does, there."""
    (start, end), (first, last) = part.bare, (part.first, part.last)
    before = _boundary(words, first, pauses) if first else None
    if not first and abs(pauses[0][1] - start) <= _LATE_SECONDS:
        before = pauses[0]
    behind = _boundary(words, last, pauses) if last < len(words) else None
    start, end = _begin(before) if before else start, _stop(behind) if behind else end
    if end - start < _LEAST_PART_SECONDS:
        return part
    return replace(part, start=start if before else part.start, end=end if behind else part.end, bare=(start, end))


def _boundary(
    words: Sequence[SpokenWord], index: int, pauses: Sequence[tuple[float, float]]
) -> tuple[float, float] | None:
    """The longest pause about where a word begins that lies neither before the word before it nor behind it itself."""
    word = words[index]
    least = max(word.start - _LATE_SECONDS, words[index - 1].start)
    most = min(word.start + _EARLY_SECONDS, max(word.end, word.start + _TIME_ERROR_SECONDS))
    near = [pause for pause in pauses[1:-1] if pause[0] < most and pause[1] > least]
    return max(near, key=lambda pause: pause[1] - pause[0], default=None)


def _pauses(speech: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Start and end of each pause; the first and the last are what is before and behind all speech, if nothing."""
    turns = np.flatnonzero(np.diff(np.r_[False, speech, False].astype(np.int8))) * FRAME_SECONDS
    if not len(turns):
        return []
    inner = zip(turns[1:-1:2].tolist(), turns[2:-1:2].tolist(), strict=True)
    long = [(start, end) for start, end in inner if end - start > _PAUSE_SECONDS - FRAME_SECONDS / 2]
    return [(0.0, float(turns[0])), *long, (float(turns[-1]), len(speech) * FRAME_SECONDS)]


def _begin(pause: tuple[float, float]) -> float:
    """Where to begin reading what is behind a pause."""
    return max(sum(pause) / 2, pause[1] - MARGIN_SECONDS)


def _stop(pause: tuple[float, float]) -> float:
    """Where to stop reading what is before a pause."""
    return min(sum(pause) / 2, pause[0] + MARGIN_SECONDS)


def timed_words(transcript: Transcript, seconds: float) -> list[SpokenWord]:
    """The words of a window; none if any has no time or no token of its own, or if times go back."""
    words = spoken_words(transcript, 0.0, seconds)
    whole = all(word.timed and word.tokens and word.start <= word.end for word in words)
    return words if whole and all(word.start <= following.start for word, following in pairwise(words)) else []


def _sentences(words: Sequence[SpokenWord]) -> Iterator[tuple[int, int]]:
    """From which to which word: up to a mark that ends a sentence, or a pause."""
    first = 0
    for index, (word, following) in enumerate(pairwise(words), 1):
        if ends_sentence(word.text) or following.start - word.end > SHORT_PAUSE_SECONDS:
            yield first, index
            first = index
    yield first, len(words)


def _bare(
    words: Sequence[SpokenWord], speech: NDArray[np.bool_], seconds: float
) -> Iterator[tuple[int, int, float, float]]:
    """Speech without a word, and words in a row that last too long: `first` and `last` of `Part`, start and end."""
    at, first, last, excess = 0.0, 0, 0, 0.0  # the run of words that last too long, and by how much
    for index, word in enumerate(words):
        silent = _spoken(speech, at, word.start) >= _LEAST_SECONDS
        too_long = _spoken(speech, word.start, word.end) - _needed(word)
        # Wrong times squeeze words between two that last too long; a run of long words includes them.
        if excess and (silent or word.end - words[last - 1].end > _SQUEEZED_SECONDS and too_long <= _TOO_LONG_SECONDS):
            if excess >= _LEAST_SECONDS:
                yield first, last, words[first].start, words[last - 1].end
            excess = 0.0
        if silent:
            yield index, index, at, word.start
        if too_long > _TOO_LONG_SECONDS:
            first, last, excess = first if excess else index, index + 1, excess + too_long
        at = max(at, word.end)
    if excess >= _LEAST_SECONDS:
        yield first, last, words[first].start, words[last - 1].end
    if _spoken(speech, at, seconds) >= _LEAST_SECONDS:
        yield len(words), len(words), at, seconds


def _needed(word: SpokenWord) -> float:
    return WORD_SECONDS + LETTER_SECONDS * len(word.text)


def _spoken(speech: NDArray[np.bool_], start: float, end: float) -> float:
    return float(speech[frame(start) : frame(end)].sum()) * FRAME_SECONDS


def frame(seconds: float) -> int:
    """The frame of a window that begins nearest to a second."""
    return max(0, round(seconds / FRAME_SECONDS))


def _edge(speech: NDArray[np.bool_], second: float, direction: int) -> float:
    """The middle of the nearest pause before or behind a second, else as far away as times may be wrong."""
    pause = round(_PAUSE_SECONDS / FRAME_SECONDS)
    reach = round(_REACH_SECONDS / FRAME_SECONDS)
    for step in range(reach):
        middle = frame(second) + direction * step
        start = middle - pause // 2
        if not 0 <= start <= len(speech) - pause:
            break
        if not speech[start : start + pause].any():
            return middle * FRAME_SECONDS
    return float(np.clip(second + direction * _TIME_ERROR_SECONDS, 0.0, len(speech) * FRAME_SECONDS))
