"""What a recognizer probably made up: words it is not sure of, and phrases it repeats in a circle.

A recognizer that loses its way writes a phrase again and again, faster than anybody speaks (Whisper and its users
judge that by how well the text compresses). Here a phrase of up to eight words that follows itself `_TIMES` times or
more is written once, if it is repeated faster than `_WORDS_PER_SECOND` or the recognizer doubts it; a chorus or "no,
no, no, no" at the pace of speech stays.
"""

from __future__ import annotations

from typing import Final

from tokenthrift.spoken_words import SpokenWord, spoken_words, written
from tokenthrift.transcript import Transcript

__all__ = ["drop_doubtful"]

_LONGEST: Final = 8
_TIMES: Final = 4
_WORDS_PER_SECOND: Final = 5.0
_DOUBT: Final = 0.4


def drop_doubtful(transcript: Transcript, seconds: float, below: float = 0.0) -> Transcript:
    """A transcript without repetitions that nobody spoke, and without doubtful words.

    Args:
        transcript: of one window.
        seconds: length of the window.
        below: words of less confidence are left out; 0 keeps all.
    """
    words = spoken_words(transcript, 0.0, seconds)
    kept = _without_circles(words, seconds)
    return written(transcript, words, [index for index in kept if words[index].confidence >= below])


def _without_circles(words: list[SpokenWord], seconds: float) -> list[int]:
    parts: list[tuple[int, int, int]] = []  # start, size and times of each phrase, most of them one word, once
    at = 0
    while at < len(words):
        size, times = _circle(words, at)
        parts.append((at, size, times))
        at += size * times
    # Without times a run may have had all of the window but what the other words need.
    spare = seconds - sum(size for _, size, _ in parts) / _WORDS_PER_SECOND
    kept: list[int] = []
    for at, size, times in parts:
        stop, room = at + size * times, spare + size / _WORDS_PER_SECOND if spare > 0 else seconds
        doubted = times >= _TIMES and _is_doubtful(words[at:stop], room)
        kept += range(at, at + size if doubted else stop)
    return kept


def _circle(words: list[SpokenWord], at: int) -> tuple[int, int]:
    """Words of the phrase that starts here and follows itself, and how often it stands; else one word, once."""
    for size in range(1, _LONGEST + 1):
        phrase = [word.text.lower() for word in words[at : at + size]]
        times = 1
        while [word.text.lower() for word in words[at + size * times : at + size * (times + 1)]] == phrase:
            times += 1
        if times >= _TIMES and len(phrase) == size:
            return size, times
    return 1, 1


def _is_doubtful(run: list[SpokenWord], room: float) -> bool:
    span = run[-1].end - run[0].start if run[0].timed else room
    return len(run) > _WORDS_PER_SECOND * max(span, 1e-3) or sum(w.confidence for w in run) < _DOUBT * len(run)
