"""The formats a transcript is written in, and a file write that is seen whole or not at all."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tokenthrift.budget import TokenUsage
from tokenthrift.transcription.results import Transcription
from tokenthrift.transcription.subtitles import make_cues, srt, vtt

__all__ = ["WRITERS", "printable", "write_atomically"]


def printable(name: str | Path) -> str:
    """A file's name for text and screen: bytes of it that are not UTF-8 cannot be written there and become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(name))


def to_text(result: Transcription) -> str:
    """One line per segment, after the name of its channel or track where there are several."""
    return "".join(f"{segment.voice}{': ' if segment.voice else ''}{segment.text}\n" for segment in result.segments)


def to_json(result: Transcription) -> str:
    """One object: `file`, `seconds`, `text`, `usage`, `windows`, `track`, and `segments` with times and tokens.

    `track` is the sound track that was read: its `number` among `of`, `language`, `title`, `default`, `channels`.
    Segments have a `channel` where each was transcribed by itself, and a `track` where all were. `notes` are there
    where the recording is not as it seems.

    Times are seconds to the millisecond. Nothing in it depends on the clock, so the same command gives the same bytes;
    another batch size may change the last digit of a confidence.
    """
    data = {
        "file": printable(result.path),
        "seconds": round(result.seconds, 3),
        "text": result.text,
        "usage": _usage(result.usage),
        "windows": result.windows,
        **({} if result.track is None else {"track": result.track.to_dict()}),
        **({"notes": list(result.notes)} if result.notes else {}),
        "segments": [
            {
                **({} if segment.track is None else {"track": segment.track}),
                **({} if segment.channel is None else {"channel": segment.channel}),
                "start": round(segment.start, 3),
                "end": round(segment.end, 3),
                "text": segment.text,
                "usage": _usage(segment.usage),
                "tokens": [
                    {"text": t.text, "confidence": round(t.confidence, 4), "start": _time(t.start), "end": _time(t.end)}
                    for t in segment.tokens
                ],
            }
            for segment in result.segments
        ],
    }
    return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


WRITERS: Final[Mapping[str, Callable[[Transcription], str]]] = MappingProxyType(
    {
        "txt": to_text,
        "json": to_json,
        "srt": lambda result: srt(make_cues(result.segments)),
        "vtt": lambda result: vtt(make_cues(result.segments)),
    }
)
"""Format, which is also the suffix of the file, to the function that makes its text."""


def write_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 so that at every moment `path` is absent, as it was, or complete, also after kill -9 or a power cut.

    The folder must exist. A killed process may leave a hidden `.NAME.XXXXXXXX.tmp` behind, never half a `path`.

    Raises:
        OSError: The disk is full, the folder read-only and the like; `path` is as it was.
        ValueError: The text has no UTF-8 form; `path` is as it was.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _usage(usage: TokenUsage) -> dict[str, Any]:
    return {"native": usage.native, "cap": usage.cap, "used": usage.used, "rounds": usage.rounds}


def _time(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
