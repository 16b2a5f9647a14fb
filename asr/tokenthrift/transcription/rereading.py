"""Parts of a window that are read once more by themselves: speech that was left out, and sentences in doubt.

Whisper now and then passes over a whole sentence of a window that holds several, and transcribes the same sentence
alone. openai-whisper moves its window to the last time it decoded and so only finds what is missing at an end. Here a
second and a half of speech or more without a word over it is cut out, from pause to pause where there are any near, and
read as a window of its own. The new words replace the old ones there if they are more and not mostly doubtful. They are
joined by `joining` like windows that overlap.

Times by cross-attention cover a recording without gaps: the word before something left out, or the one after, lasts
until its end. So words in a row that together last a second and a half longer than they need are themselves read
again. Where that brings nothing, what is behind the first of them is read, as Whisper may stop after it.

Where speakers follow each other, Whisper transcribes a sentence worse in a window of several than alone. So a sentence
of a window of ten seconds or more whose words have a mean confidence below 0.75 is read alone. The new text replaces it
unless its confidence is lower by 0.1 or more, or it has far fewer or more words; a little less is accepted, as Whisper
is no less sure of the worse text. All numbers were chosen on development data (`docs/transcription.md`). A recognizer
says whether it gains by this (`reads_sentences_alone`). openai-whisper instead reads the whole of a doubtful window
again, at a higher temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription.joining import (
    LETTER_SECONDS,
    WORD_SECONDS,
    SpokenWord,
    division,
    plain,
    shifted,
    spoken_words,
)
from tokenthrift.transcription.results import total_usage
from tokenthrift.transcription.windows import FRAME_SECONDS, SHORT_PAUSE_SECONDS
from tokenthrift.words import ends_sentence, joined_words, parts_words

__all__ = ["Part", "doubtful", "left_out", "to_reread", "with_reread"]

_LEAST_SECONDS: Final = 1.5
_TOO_LONG_SECONDS: Final = 0.3
_SQUEEZED_SECONDS: Final = 0.5
_REACH_SECONDS: Final = 0.5
_TIME_ERROR_SECONDS: Final = 0.1
_PAUSE_SECONDS: Final = 0.1
_LEAST_CONFIDENCE: Final = 0.4
# Two parts so near each other are one: what is left out between two words may make both of them too long.
_SAME_SECONDS: Final = 0.5

_LEAST_WINDOW_SECONDS: Final = 10.0
_LEAST_SENTENCE_SECONDS: Final = 0.8
_DOUBT: Final = 0.75
_SURER: Final = 0.1
_FEWEST_WORDS: Final = 0.75
_MOST_WORDS: Final = 1.5


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


def to_reread(transcript: Transcript, speech: NDArray[np.bool_]) -> list[Part]:
    """What to read again of a window, in order: what was left out, and sentences in doubt that share nothing with it.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.
    """
    gaps = left_out(transcript, speech)
    apart = [
        part
        for part in doubtful(transcript, speech)
        if all(part.last <= gap.first or part.first >= gap.last for gap in gaps)
        and all(part.bare[1] <= gap.bare[0] or part.bare[0] >= gap.bare[1] for gap in gaps)
    ]
    return sorted([*gaps, *apart], key=lambda part: (part.first, part.bare))


def left_out(transcript: Transcript, speech: NDArray[np.bool_], *, behind_word: bool = False) -> list[Part]:
    """Where a window holds speech that its transcript does not.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.
        behind_word: only find words in a row that last too long, and leave the first of them out of each part, as a
            recognizer may stop after the word with which a part begins.

    Returns:
        Parts in order. Their bare spans share nothing; what is read around them may.
    """
    seconds = len(speech) * FRAME_SECONDS
    words = _timed_words(transcript, seconds)
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
    return found


def doubtful(transcript: Transcript, speech: NDArray[np.bool_]) -> list[Part]:
    """Sentences that the recognizer is not sure of, in a long window that holds others besides.

    Args:
        transcript: of the window; without times nothing is found.
        speech: `(frames,)` of the window, whether somebody speaks.

    Returns:
        Parts in order; what is read around a sentence reaches at most half a second into the word behind it.
    """
    seconds = len(speech) * FRAME_SECONDS
    words = _timed_words(transcript, seconds)
    if seconds < _LEAST_WINDOW_SECONDS or not words:
        return []
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
        edges = min(max(_edge(speech, start, -1), before), start), max(min(_edge(speech, end, 1), behind), end)
        found.append(Part(*edges, first, last, (start, end), confidence))
    return found


def with_reread(transcript: Transcript, part: Part, reread: Transcript) -> Transcript:
    """The transcript with what reading a part again has found, or as it was where that is no better.

    Args:
        transcript: of the window.
        part: of `to_reread` or `left_out`, for this transcript.
        reread: of the part, times from its start.
    """
    same = replace(transcript, usage=total_usage((transcript.usage, reread.usage)))
    reread = shifted(reread, part.start)
    words = spoken_words(transcript, 0.0, part.end)
    again = _timed_words(reread, part.end)
    before, behind = words[: part.first], words[part.last :]
    # A sentence may begin or end with the word beside it: only what is none of its own words is joined with others.
    lead, trail = (None, None) if part.confidence is None else _surplus(words[part.first : part.last], again)
    up_to, begin, stop, go_on = len(before), 0, len(again), 0
    if lead != 0:
        up_to, begin = division(before, again[:lead], (part.start, part.bare[0]), 0)
    if trail != 0:
        least = begin if trail is None else max(begin, len(again) - trail)
        stop, go_on = division(again, behind, (part.bare[1], part.end), least)
    old, new = len(words) - len(behind[go_on:]) - up_to, again[begin:stop]
    if not _better(part, old, new):
        return same
    return _spliced(same, (before[:up_to], behind[go_on:]), reread, new)


def _better(part: Part, old: int, new: Sequence[SpokenWord]) -> bool:
    """Whether the words that were read again are better than the `old` words, a count, that they would replace."""
    confidence = sum(word.confidence for word in new) / max(len(new), 1)
    if part.confidence is None:
        return len(new) > old and confidence >= _LEAST_CONFIDENCE
    # Far more words are mostly a phrase that repeats, and the recognizer may be sure of it.
    as_many = _FEWEST_WORDS * old <= len(new) <= 1 + _MOST_WORDS * old
    return as_many and confidence > part.confidence - _SURER


def _surplus(own: Sequence[SpokenWord], again: Sequence[SpokenWord]) -> tuple[int | None, int | None]:
    """How many words of a sentence that was read again stand before its first own word, and behind its last one.

    None where that word was not read again.
    """
    old, new = [plain(word.text) for word in own], [plain(word.text) for word in again]
    *runs, _ = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    if not runs:
        return None, None
    first, last = runs[0], runs[-1]
    return (
        first.b if first.a == 0 else None,
        len(again) - last.b - last.size if last.a + last.size == len(own) else None,
    )


def _timed_words(transcript: Transcript, seconds: float) -> list[SpokenWord]:
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
    return float(speech[_frame(start) : _frame(end)].sum()) * FRAME_SECONDS


def _frame(seconds: float) -> int:
    return max(0, round(seconds / FRAME_SECONDS))


def _edge(speech: NDArray[np.bool_], second: float, direction: int) -> float:
    """The middle of the nearest pause before or behind a second, else as far away as times may be wrong."""
    pause = round(_PAUSE_SECONDS / FRAME_SECONDS)
    reach = round(_REACH_SECONDS / FRAME_SECONDS)
    for step in range(reach):
        middle = _frame(second) + direction * step
        start = middle - pause // 2
        if not 0 <= start <= len(speech) - pause:
            break
        if not speech[start : start + pause].any():
            return middle * FRAME_SECONDS
    return float(np.clip(second + direction * _TIME_ERROR_SECONDS, 0.0, len(speech) * FRAME_SECONDS))


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
