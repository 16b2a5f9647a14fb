"""What the batch job gives back for one recording: its segments with absolute times, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenthrift.budget import TokenUsage
from tokenthrift.transcript import Transcript, TranscriptToken

if TYPE_CHECKING:  # The command writes its help before anything heavy is imported.
    from tokenthrift.media.audio_track import AudioTrack
    from tokenthrift.transcription.sound import Source

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
        channel: The channel it was said on ("left", "right" or a number), where each was transcribed by itself.
        track: The number of its track, where all were transcribed.
    """

    start: float
    end: float
    text: str
    tokens: tuple[TranscriptToken, ...]
    usage: TokenUsage
    channel: str | None = None
    track: int | None = None

    @property
    def voice(self) -> str:
        """The track and the channel, where they tell segments apart: "left", "track 2", "track 2 left"."""
        parts = (None if self.track is None else f"track {self.track}", self.channel)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Transcription:
    """The result of one recording; a failed one has an error and no segments.

    Attributes:
        path: The recording, as it was given.
        seconds: Its length; 0 where it could not be read.
        segments: Segments in order of their start; none for silence. Only those of different channels or tracks
            overlap.
        usage: Sums over all windows the model saw, those without text included.
        windows: How many windows the model saw.
        error: Why there is no transcript.
        track: The sound track that was read, which tells how many there are; None where all or none were.
        notes: What a reader of the transcript should know of the recording, a sentence each.
    """

    path: Path
    seconds: float
    segments: tuple[Segment, ...]
    usage: TokenUsage
    windows: int
    error: str | None = None
    track: AudioTrack | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole transcript on one line."""
        return " ".join(segment.text for segment in self.segments)


def to_segment(transcript: Transcript, start: float, end: float, source: Source | None = None) -> Segment:
    """Moves a window's transcript to its place in the recording.

    Token times are kept inside the window and in order, whatever the model says.

    Args:
        transcript: What the model wrote for the window; times from the start of the window.
        start: Start of the window in seconds.
        end: End of the window in seconds.
        source: What sound it was.
    """
    tokens = []
    earliest = start
    for token in transcript.tokens:
        if token.start is not None and token.end is not None:
            begins = min(max(start + token.start, earliest), end)
            token = replace(token, start=begins, end=min(max(start + token.end, begins), end))
            earliest = begins
        tokens.append(token)
    return Segment(
        start,
        end,
        " ".join(transcript.text.split()),
        tuple(tokens),
        transcript.usage,
        channel=None if source is None else source.channel,
        track=source.track.number if source is not None and source.of_all else None,
    )


def total_usage(usages: Iterable[TokenUsage]) -> TokenUsage:
    """Sums of native, cap, used and rounds; all zero for nothing."""
    items = list(usages)
    return TokenUsage(
        native=sum(item.native for item in items),
        cap=sum(item.cap for item in items),
        used=sum(item.used for item in items),
        rounds=sum(item.rounds for item in items),
    )
