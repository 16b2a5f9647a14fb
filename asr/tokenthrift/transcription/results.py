"""What the batch job gives back for one recording: its segments with absolute times, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tokenthrift.budget import TokenUsage
from tokenthrift.transcript import Transcript, TranscriptToken

__all__ = ["Segment", "Transcription", "to_segment", "total_usage"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A window of a recording that holds speech.

    Attributes:
        start: Seconds from the start of the recording.
        end: Seconds from the start of the recording, after `start`.
        text: What was said, never empty.
        tokens: Written pieces of the text; times from the start of the recording, in order and inside the segment.
        usage: What the window cost.
    """

    start: float
    end: float
    text: str
    tokens: tuple[TranscriptToken, ...]
    usage: TokenUsage


@dataclass(frozen=True, slots=True)
class Transcription:
    """The result of one recording; a failed one has an error and no segments.

    Attributes:
        path: The recording, as it was given.
        seconds: Its length; 0 where it could not be read.
        segments: Segments in order, without overlap; none for silence.
        usage: Sums over all windows the model saw, those without text included.
        windows: How many windows the model saw.
        error: Why there is no transcript.
    """

    path: Path
    seconds: float
    segments: tuple[Segment, ...]
    usage: TokenUsage
    windows: int
    error: str | None = None

    @property
    def text(self) -> str:
        """The whole transcript on one line."""
        return " ".join(segment.text for segment in self.segments)


def to_segment(transcript: Transcript, start: float, end: float) -> Segment:
    """Moves a window's transcript to its place in the recording.

    Token times are kept inside the window and in order, whatever the model says.

    Args:
        transcript: What the model wrote for the window; times from the start of the window.
        start: Start of the window in seconds.
        end: End of the window in seconds.
    """
    tokens = []
    earliest = start
    for token in transcript.tokens:
        if token.start is not None and token.end is not None:
            begins = min(max(start + token.start, earliest), end)
            token = replace(token, start=begins, end=min(max(start + token.end, begins), end))
            earliest = begins
        tokens.append(token)
    return Segment(start, end, " ".join(transcript.text.split()), tuple(tokens), transcript.usage)


def total_usage(usages: Iterable[TokenUsage]) -> TokenUsage:
    """Sums of native, cap, used and rounds; all zero for nothing."""
    items = list(usages)
    return TokenUsage(
        native=sum(item.native for item in items),
        cap=sum(item.cap for item in items),
        used=sum(item.used for item in items),
        rounds=sum(item.rounds for item in items),
    )
