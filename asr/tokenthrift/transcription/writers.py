"""The formats a transcript is written in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tokenthrift.budget import TokenUsage
from tokenthrift.transcript import Word
from tokenthrift.transcription.results import FileTranscript, Segment
from tokenthrift.transcription.subtitles import karaoke, make_cues, srt, vtt

__all__ = ["WRITERS", "manifest_row", "one_line", "printable"]


def printable(name: str | Path) -> str:
    """A file's name for text and screen: bytes of it that are not UTF-8 cannot be written there and become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(name))


def one_line(text: str | Path) -> str:
    """A name or message for the screen: control characters, which a name may hold, are written as escapes.

    A line break in a name would otherwise begin a message of its own, and an escape sequence speak to the terminal.
    """
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], printable(text))


def to_text(result: FileTranscript) -> str:
    """One line per segment, after the name of its channel or track where there are several."""
    return "".join(f"{segment.voice}{': ' if segment.voice else ''}{segment.text}\n" for segment in result.segments)


def to_tsv(result: FileTranscript) -> str:
    """Tab-separated `start`, `end` and `text` under a header, milliseconds, as Whisper's command writes it."""
    rows = [
        f"{round(1000 * segment.start)}\t{round(1000 * segment.end)}\t{' '.join(segment.text.split())}\n"
        for segment in result.segments
    ]
    return "".join(["start\tend\ttext\n", *rows])


def to_json(result: FileTranscript) -> str:
    """One object: `file`, `status`, `seconds`, `text`, `confidence`, `usage`, `windows`, `track`, and `segments`.

    `status` is "completed", "no speech" or "failed", and then there is an `error` with its `type` and `message`, and
    `confidence` is null.
    `track` is the sound track that was read: its `number` among `of`, `language`, `title`, `default`, `channels`.
    Segments have times, `words` and `tokens`; a `channel` where each was transcribed by itself, and a `track` where all
    were. `budget` holds the limits that were asked for of every window, if any, and `usage` what came of them: `native`
    tokens of the sound, the `cap` that was accepted, what was `used` of it, `new_tokens` of text, and `rounds`. `notes`
    are there where the recording is not as it seems, `offset` where a part of a file was transcribed.

    Times are seconds to the millisecond. Nothing in it depends on the clock, so the same command gives the same bytes;
    another batch size may change the last digit of a confidence.
    """
    error = {"error": {"type": result.error_type or "Error", "message": result.error}} if result.error else {}
    data = {
        "file": printable(result.path),
        "status": result.status,
        **error,
        **({"offset": round(result.offset, 3)} if result.offset else {}),
        "seconds": round(result.seconds, 3),
        "text": result.text,
        "confidence": _confidence(result),
        **({} if result.reference is None else {"reference": result.reference}),
        **({"budget": asked} if (asked := _asked(result)) else {}),
        "usage": _usage(result.usage, result.new_tokens),
        "windows": result.windows,
        **({} if result.track is None else {"track": result.track.to_dict()}),
        **({"notes": list(result.notes)} if result.notes else {}),
        "segments": [_segment(segment) for segment in result.segments],
    }
    return printable(json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False)) + "\n"


def manifest_row(result: FileTranscript) -> dict[str, Any]:
    """The line of a recording in a manifest of results, with the names of NeMo's.

    These are `audio_filepath`, `duration`, `text` (what was said, where that is known) and `pred_text`; besides there
    are `status`, `confidence` (null where it failed), `native`, `cap`, `tokens` (used), `new_tokens` (of the text) and
    `rounds`.
    """
    return {
        "audio_filepath": printable(result.path),
        **({"offset": round(result.offset, 3)} if result.offset else {}),
        "duration": round(result.seconds, 3),
        **({} if result.reference is None else {"text": result.reference}),
        "pred_text": result.text,
        "status": result.status,
        **(
            {"error": {"type": result.error_type or "Error", "message": printable(result.error)}}
            if result.error is not None
            else {}
        ),
        "confidence": _confidence(result),
        "native": result.usage.native,
        "cap": result.usage.cap,
        "tokens": result.usage.used,
        "new_tokens": result.new_tokens,
        "rounds": result.usage.rounds,
    }


WRITERS: Final[Mapping[str, Callable[[FileTranscript], str]]] = MappingProxyType(
    {
        "txt": to_text,
        "json": to_json,
        "srt": lambda result: srt(make_cues(result.segments)),
        "vtt": lambda result: vtt(make_cues(result.segments)),
        "tsv": to_tsv,
        "karaoke": lambda result: karaoke(make_cues(result.segments)),
    }
)
"""Format, which is also the suffix of the file (of karaoke: karaoke.vtt), to the function that makes its text."""


def _confidence(result: FileTranscript) -> float | None:
    return None if result.confidence is None else round(result.confidence, 4)


def _segment(segment: Segment) -> dict[str, Any]:
    return {
        **({} if segment.track is None else {"track": segment.track}),
        **({} if segment.channel is None else {"channel": segment.channel}),
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "usage": _usage(segment.usage, len(segment.tokens)),
        "words": [_word(word) for word in segment.words],
        "tokens": [
            {"text": t.text, "confidence": round(t.confidence, 4), "start": _time(t.start), "end": _time(t.end)}
            for t in segment.tokens
        ],
    }


def _word(word: Word) -> dict[str, Any]:
    return {
        "text": word.text,
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "confidence": round(word.confidence, 4),
    }


def _usage(usage: TokenUsage, new_tokens: int) -> dict[str, Any]:
    return {
        "native": usage.native,
        "cap": usage.cap,
        "used": usage.used,
        "new_tokens": new_tokens,
        "rounds": usage.rounds,
    }


def _asked(result: FileTranscript) -> dict[str, Any]:
    """The limits that were set, by their names in TokenBudget and DecodeBudget."""
    decode = {name: value for name, value in result.decode.to_dict().items() if value not in (None, ())}
    return {**result.budget.to_dict(), **decode}


def _time(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
