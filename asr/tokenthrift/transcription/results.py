"""What the batch job gives back for one recording: its segments with absolute times, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tokenthrift.budget import DecodeBudget, TokenBudget, TokenUsage
from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.words import joined_words, words_of_tokens

if TYPE_CHECKING:  # The command writes its help before anything heavy is imported.
    from tokenthrift.media.audio_track import AudioTrack
    from tokenthrift.transcription.sound import Source

__all__ = ["FileTranscript", "Segment", "Status", "to_segment", "total_usage"]

Status: TypeAlias = Literal["completed", "no speech", "failed"]


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
        words: Words with their times, in order and inside the segment; none where neither the model nor an aligner
            gives times.
    """

    start: float
    end: float
    text: str
    tokens: tuple[TranscriptToken, ...]
    usage: TokenUsage
    channel: str | None = None
    track: int | None = None
    words: tuple[Word, ...] = ()

    @property
    def voice(self) -> str:
        """The track and the channel, where segments differ in them: "left", "track 2", "track 2 left"."""
        parts = (None if self.track is None else f"track {self.track}", self.channel)
        return " ".join(part for part in parts if part)

    @property
    def confidence(self) -> float:
        """Mean over the words, or over the tokens where words have no times; 1 where there are neither."""
        parts = self.words or self.tokens
        return sum(part.confidence for part in parts) / len(parts) if parts else 1.0


@dataclass(frozen=True, slots=True)
class FileTranscript:
    """The result of one recording; a failed one has an error and no segments.

    Attributes:
        path: The recording, as it was given; the name of one that was given as samples.
        seconds: Its length; 0 where it could not be read.
        segments: Segments in order of their start; none for silence. Only those of different channels or tracks
            overlap.
        usage: Sums over all windows the model saw, those without text included.
        windows: How many windows the model saw, parts that it read again counted.
        error: Why there is no transcript.
        track: The sound track that was read, which tells how many there are; None where all or none were.
        notes: What a reader of the transcript should know of the recording, a sentence each.
        error_type: The kind of the error, such as "AudioError".
        reference: What was said, where that is known.
        offset: Seconds of the file before the part that was transcribed.
        budget: Ceilings in tokens that were asked for of every window; `usage.cap` was accepted, `usage.used` spent.
        decode: What was asked of decoding.
        seconds_spent: Wall seconds the model took for its share of the batches; of a failed recording, those before.
    """

    path: Path
    seconds: float
    segments: tuple[Segment, ...]
    usage: TokenUsage
    windows: int
    error: str | None = None
    track: AudioTrack | None = None
    notes: tuple[str, ...] = ()
    error_type: str | None = None
    reference: str | None = None
    offset: float = 0.0
    budget: TokenBudget = field(default_factory=TokenBudget)
    decode: DecodeBudget = field(default_factory=DecodeBudget)
    seconds_spent: float = field(default=0.0, compare=False)

    @property
    def text(self) -> str:
        """The whole transcript on one line."""
        return joined_words(segment.text for segment in self.segments)

    @property
    def new_tokens(self) -> int:
        """Written pieces of the text, over all segments."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def words(self) -> tuple[Word, ...]:
        """All words that have times."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def status(self) -> Status:
        """ "completed", "no speech" where nothing was said, or "failed"."""
        if self.error is not None:
            return "failed"
        return "completed" if self.segments else "no speech"

    @property
    def confidence(self) -> float | None:
        """Mean over the segments' words or tokens; 1 where nothing was said, None where there is no transcript."""
        if self.error is not None:
            return None
        parts = [part for segment in self.segments for part in (segment.words or segment.tokens)]
        return sum(part.confidence for part in parts) / len(parts) if parts else 1.0


def to_segment(transcript: Transcript, start: float, end: float, source: Source | None = None) -> Segment:
    """Moves a window's transcript to the clock of the recording.

    Times are kept inside the window and in order, whatever the model says.

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
        track=source.track.number if source is not None and source.track is not None and source.of_all else None,
        words=_placed(transcript.words, start, end) or words_of_tokens(tokens),
    )


def _placed(words: Iterable[Word], start: float, end: float) -> tuple[Word, ...]:
    placed: list[Word] = []
    for word in words:
        begins = min(max(start + word.start, placed[-1].end if placed else start), end)
        placed.append(replace(word, start=begins, end=min(max(start + word.end, begins), end)))
    return tuple(placed)


def total_usage(usages: Iterable[TokenUsage]) -> TokenUsage:
    """Sums of native, cap, used and rounds; all zero for nothing."""
    items = list(usages)
    return TokenUsage(
        native=sum(item.native for item in items),
        cap=sum(item.cap for item in items),
        used=sum(item.used for item in items),
        rounds=sum(item.rounds for item in items),
    )
