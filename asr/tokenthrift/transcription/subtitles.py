"""Segments to subtitles: cues of at most two lines of 42 characters and about 7 seconds, in order, never overlapping.

The limits are those of broadcasters' style guides (42 characters, two lines, 1 to 7 seconds, 17 characters a second to
read); a Chinese, Japanese or Korean character counts as two. A cue stays after the last word for as long as its text
takes to read, until the next one comes. Where words have no times, a segment's time is shared out by the number of
characters. A cue ends where the next word would not fit, where the speaker pauses, and after a sentence. `karaoke` puts
the time of every word into WebVTT. Whisper's and WhisperX's writers make one cue per window by default, and write the
text unescaped.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from tokenthrift.transcription.results import Segment
from tokenthrift.words import ends_sentence, joined_words, split_words, words_of_tokens

__all__ = ["Cue", "karaoke", "make_cues", "srt", "vtt"]

LINE_CHARACTERS: Final = 42
LINES: Final = 2
MAX_SECONDS: Final = 7.0
MIN_SECONDS: Final = 1.0
PAUSE_SECONDS: Final = 1.0
READING_CHARACTERS: Final = 17.0  # a second

# SubRip has no escapes, and players take <...> and {...} for markup: these look alike and mean nothing to them.
_SRT_ESCAPES: Final = str.maketrans("<>{}", "‹›()")
_VTT_ESCAPES: Final = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle.

    Attributes:
        start: Milliseconds from the start of the recording.
        end: After `start`.
        lines: Its text.
        word_starts: Milliseconds at which each word of the lines begins, in order; a name of a channel has none.
        words: The words.
    """

    start: int
    end: int
    lines: tuple[str, ...]
    word_starts: tuple[int, ...] = field(default=(), compare=False)
    words: tuple[str, ...] = field(default=(), compare=False)


@dataclass(slots=True)
class _Word:
    text: str
    start: float
    end: float


def make_cues(segments: Iterable[Segment]) -> list[Cue]:
    """Divides segments into cues.

    Args:
        segments: Segments in order; only those of different channels or tracks overlap.

    Returns:
        Cues in order; each starts at or after the end of the one before and lasts at least a millisecond. Their lines
        hold all words of the segments in order. With several channels or tracks that is so for each of them; a cue
        begins with the name of its own.
    """
    segments = list(segments)
    voices = sorted({segment.voice for segment in segments})
    if len(voices) < 2:
        return _cues(segments)
    cues = [
        cue
        for voice in voices
        for cue in _cues([segment for segment in segments if segment.voice == voice], f"{voice}: ")
    ]
    return sorted(cues, key=lambda cue: cue.start)


def _cues(segments: list[Segment], name: str = "") -> list[Cue]:
    groups = [(group, segment.end) for segment in segments for group in _groups(_words(segment), name)]
    cues: list[Cue] = []
    for index, (group, limit) in enumerate(groups):
        last = cues[-1].end if cues else 0
        start = max(last, _milliseconds(group[0].start))
        end = min(_milliseconds(group[-1].end), start + _milliseconds(MAX_SECONDS))
        # A flash of text cannot be read: it stays while nothing else is said, at most into the next second of silence.
        texts = [*name.split(), *(word.text for word in group)]
        last_group = index + 1 == len(groups)
        following = limit if last_group else groups[index + 1][0][0].start
        needed = min(MAX_SECONDS, max(MIN_SECONDS, _columns(joined_words(texts)) / READING_CHARACTERS))
        end = max(end, min(start + _milliseconds(needed), _milliseconds(following)), start + 1)
        starts = tuple(_milliseconds(word.start) for word in group)
        cues.append(Cue(start, end, tuple(_wrap(texts)), starts, tuple(word.text for word in group)))
    return cues


def srt(cues: Iterable[Cue]) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    blocks = []
    for number, cue in enumerate(cues, 1):
        lines = "\n".join(cue.lines).translate(_SRT_ESCAPES)
        blocks.append(f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{lines}\n")
    return "\n".join(blocks)


def vtt(cues: Iterable[Cue]) -> str:
    """WebVTT: a header, a full stop before the milliseconds, escaped text."""
    blocks = ["WEBVTT\n"]
    for cue in cues:
        lines = "\n".join(cue.lines).translate(_VTT_ESCAPES)
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{lines}\n")
    return "\n".join(blocks)


def karaoke(cues: Iterable[Cue]) -> str:
    """WebVTT with a timestamp before every word but the first, at which a player lights it up.

    Timestamps lie inside of their cue and rise, as the format demands; a word that would break that has none.
    """
    blocks = ["WEBVTT\n"]
    for cue in cues:
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_timed_text(cue)}\n")
    return "\n".join(blocks)


def _timed_text(cue: Cue) -> str:
    text = "\n".join(cue.lines)
    # Behind a name stand the words, in order. Only what is no space is counted: it may be anywhere.
    place = _letters(text) - sum(map(_letters, cue.words))
    words: dict[int, tuple[int, int]] = {}
    for word, begins in zip(cue.words, cue.word_starts, strict=True):
        words[place] = begins, place + _letters(word)
        place += _letters(word)
    parts: list[str] = []
    at, count, stop = cue.start, 0, -1
    for letter in text:
        if not letter.isspace():
            begins, end = words.get(count, (at, -1))
            if at < begins < cue.end:
                parts.append(f"<{_clock(begins, '.')}><c>")
                at, stop = begins, end
            count += 1
        parts.append(letter.translate(_VTT_ESCAPES))
        if count == stop:
            parts.append("</c>")
            stop = -1
    return "".join(parts)


def _letters(text: str) -> int:
    return sum(not letter.isspace() for letter in text)


def _words(segment: Segment) -> list[_Word]:
    """Words of a segment with their times; a word longer than a line is divided."""
    words: list[_Word] = []
    if placed := segment.words or words_of_tokens(segment.tokens):
        words = [_Word(word.text, word.start, word.end) for word in placed]
    else:
        texts = split_words(segment.text)
        # One character more for the space after each word.
        share = (segment.end - segment.start) / max(1, sum(len(text) + 1 for text in texts))
        at = segment.start
        for text in texts:
            words.append(_Word(text, at, at + share * (len(text) + 1)))
            at += share * (len(text) + 1)
    return [part for word in words if word.text for part in _divided(word)]


def _divided(word: _Word) -> Iterator[_Word]:
    size = LINE_CHARACTERS // (1 if _columns(word.text) == len(word.text) else 2)
    count = -(-len(word.text) // size)
    step = (word.end - word.start) / count
    for index in range(count):
        text = word.text[index * size : (index + 1) * size]
        yield _Word(text, word.start + index * step, word.start + (index + 1) * step)


def _groups(words: Iterable[_Word], name: str) -> Iterator[list[_Word]]:
    """Words of one cue each, which begins with a name."""
    group: list[_Word] = []
    for word in words:
        if group and (
            len(_lines([*name.split(), *(w.text for w in group), word.text], LINE_CHARACTERS)) > LINES
            or word.end - group[0].start > MAX_SECONDS
            or word.start - group[-1].end > PAUSE_SECONDS
            or (ends_sentence(group[-1].text) and word.start - group[0].start >= MIN_SECONDS)
        ):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _wrap(words: Sequence[str]) -> list[str]:
    """One line, or two of about the same length: the eye finds the second line sooner."""
    lines = _lines(words, LINE_CHARACTERS)
    if len(lines) < 2:
        return lines
    for width in range(-(-_columns(joined_words(words)) // LINES), LINE_CHARACTERS):
        narrow = _lines(words, width)
        if len(narrow) <= LINES and max(map(_columns, narrow)) <= LINE_CHARACTERS:
            return narrow
    return lines


def _lines(words: Iterable[str], width: int) -> list[str]:
    """As many words on each line as it holds, at least one."""
    lines: list[str] = []
    for word in words:
        text = joined_words([*lines[-1:], word])
        if lines and _columns(text) <= width:
            lines[-1] = text
        else:
            lines.append(word)
    return lines


def _columns(text: str) -> int:
    """How wide a text is: full-width characters, of Chinese, Japanese and Korean, count twice."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _clock(milliseconds: int, point: str) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{thousandths:03}"
