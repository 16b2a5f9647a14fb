"""Transcripts of windows that overlap, joined: no word of the overlap is lost, none is written twice.

Speech without a pause is cut anyway, and a word may lie on the cut. The two windows then share some seconds. Where both
transcripts have the same words at about the same time, the first one is followed up to the middle of that run and the
second one from there, so that what either wrote at its own edge, where it had half a word, is not used. Where they
have no word in common, the middle of the overlap divides them by the times of the words; if one of them has no word up
to there, the other one is followed as far as that reaches. A recognizer without times is taken to speak evenly.

WhisperX cuts without overlap; transformers' pipeline joins by the longest common sequence of tokens alone, which takes
a word said twice for the same word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenthrift.spoken_words import SpokenWord, shifted, spoken_words, written
from tokenthrift.transcript import Transcript

__all__ = ["LETTER_SECONDS", "WORD_SECONDS", "division", "join_overlaps", "plain"]

WORD_SECONDS: Final = 0.6
LETTER_SECONDS: Final = 0.1
"""Nobody needs longer for a word of so many letters, unless to stretch it."""

# Two windows give a word times that differ by about so many seconds.
_SAME_TIME: Final = 0.6
_SAME_TIME_GUESSED: Final = 2.0


def join_overlaps(
    transcripts: Sequence[Transcript], windows: Sequence[tuple[float, float]]
) -> list[tuple[Transcript, float, float]]:
    """Removes from the transcripts of windows that follow each other what two of them wrote of the same second.

    Args:
        transcripts: of every window, in order.
        windows: start and end of every window in seconds of the recording; starts and ends ascend.

    Returns:
        As many transcripts, each with a start and an end that no other shares, and times from that start. Those of
        windows that share nothing are as they were.
    """
    spoken = [spoken_words(transcript, *window) for transcript, window in zip(transcripts, windows, strict=True)]
    first, last = [0] * len(spoken), [len(words) for words in spoken]
    starts, ends = [start for start, _ in windows], [end for _, end in windows]
    for index in range(1, len(windows)):
        overlap = windows[index][0], windows[index - 1][1]
        if overlap[0] < overlap[1]:
            last[index - 1], first[index] = division(spoken[index - 1], spoken[index], overlap, first[index - 1])
            edges = [_spoken_span(word, last=True)[1] for word in spoken[index - 1][: last[index - 1]][-1:]]
            edges += [_spoken_span(word, last=False)[0] for word in spoken[index][first[index] :][:1]]
            edge = min(max(sum(edges or overlap) / len(edges or overlap), overlap[0]), overlap[1])
            starts[index] = ends[index - 1] = max(edge, starts[index - 1])
    joined = []
    for index, (transcript, words) in enumerate(zip(transcripts, spoken, strict=True)):
        kept = written(transcript, words, range(first[index], last[index]))
        joined.append((shifted(kept, windows[index][0] - starts[index]), starts[index], ends[index]))
    return joined


def division(
    before: Sequence[SpokenWord], after: Sequence[SpokenWord], overlap: tuple[float, float], least: int
) -> tuple[int, int]:
    """Up to which word the window before is followed, and from which the one after.

    Args:
        before: words of a window.
        after: those of the next one.
        overlap: seconds from which to which both windows reach.
        least: so many words of `before` are followed in any case.
    """
    start, end = overlap
    timed = all(word.timed for word in (*before, *after))
    near = _SAME_TIME if timed else _SAME_TIME_GUESSED
    tail = [i for i, word in enumerate(before) if i >= least and word.end > start - near]
    head = [i for i, word in enumerate(after) if word.start < end + near]
    middle = (start + end) / 2
    runs = _runs([before[i] for i in tail], [after[i] for i in head], near)
    if runs:
        longest = max(map(len, runs))
        centers = [run[len(run) // 2] for run in runs if len(run) == longest]
        a, b = min(centers, key=lambda pair: abs(_center(before[tail[pair[0]]]) - middle))
        return tail[a], head[b]
    # Where one of the two wrote nothing up to the middle, what the other one wrote there is all there is.
    ends = _spoken_span(before[-1], last=True) if before[least:] else (start, start)
    begins = _spoken_span(after[0], last=False) if after else (end, end)
    point = ends[1] if ends[1] < middle else max(middle, begins[0])
    before_centers = [*map(_center, before[:-1]), sum(ends) / 2]
    after_centers = [sum(begins) / 2, *map(_center, after[1:])]
    cut_off = (i for i in range(least, len(before)) if ends[1] >= middle and before_centers[i] >= point)
    return next(cut_off, len(before)), next((i for i in range(len(after)) if after_centers[i] >= point), len(after))


def _runs(before: Sequence[SpokenWord], after: Sequence[SpokenWord], near: float) -> list[list[tuple[int, int]]]:
    """Runs of pairs of words that both windows wrote, as indices: equal words at most so many seconds apart.

    Of all alignments that keep the order it is the one with the largest sum over its pairs: 2 for a pair at the same
    time, down to 1 for one as far apart as allowed. So a word that is said again and again is paired with itself.
    """
    left, right = [plain(word.text) for word in before], [plain(word.text) for word in after]
    # gains[i][j]: of the best alignment of what follows the first i and j words.
    gains = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]

    def gain(i: int, j: int) -> float:
        apart = abs(before[i].start - after[j].start)
        return 2 - apart / near + gains[i + 1][j + 1] if left[i] == right[j] and apart <= near else 0.0

    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            gains[i][j] = max(gains[i + 1][j], gains[i][j + 1], gain(i, j))
    runs: list[list[tuple[int, int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if gains[i][j] == gains[i + 1][j]:
            i += 1
        elif gains[i][j] == gains[i][j + 1]:
            j += 1
        else:
            if runs and runs[-1][-1] == (i - 1, j - 1):
                runs[-1].append((i, j))
            else:
                runs.append([(i, j)])
            i, j = i + 1, j + 1
    return runs


def _spoken_span(word: SpokenWord, *, last: bool) -> tuple[float, float]:
    """Start and end of the first or last word of a window, which may have been given all the time up to its edge."""
    needed = WORD_SECONDS + LETTER_SECONDS * len(word.text)
    if not word.timed or word.end - word.start <= needed:
        return word.start, word.end
    return (word.start, word.start + needed) if last else (word.end - needed, word.end)


def _center(word: SpokenWord) -> float:
    return (word.start + word.end) / 2


def plain(text: str) -> str:
    """A word to compare with others: its letters and digits in lower case, or what it has instead."""
    return "".join(letter for letter in text.lower() if letter.isalnum()) or text
