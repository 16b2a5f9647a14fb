"""Which sound of a recording is transcribed: a track, all of them, a mix of the channels or each by itself.

Without a choice the default track is read. If that is silent from end to end and another is not, the other is read and
a note says so: screen recorders put the desktop on one track and the microphone on the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenthrift.media.audio import RATES, AudioError, Samples, resample, stream_samples
from tokenthrift.media.audio_track import MAX_CHANNELS, AudioTrack, audio_tracks, choose_track
from tokenthrift.media.container import LOST_SECONDS
from tokenthrift.media.mixing import Channels, channel_name
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.vad import SAMPLE_RATE, SpeechDetector, load_vad, speech_frames
from tokenthrift.transcription.windows import FRAME_SECONDS, Window, cut, frame_levels, plan_windows, sounding

__all__ = ["ChannelChoice", "Plan", "Source", "TrackChoice", "missing_sound", "plan_sound"]

TrackChoice: TypeAlias = int | str | None
ChannelChoice: TypeAlias = Literal["mix", "left", "right", "each"]

_MIN_SECONDS: Final = 0.1
_KEEP_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Source:
    """Sound to be transcribed by itself.

    Attributes:
        track: where it comes from; None for samples in memory.
        channels: what is read of the track.
        channel: the name of the channel where each is transcribed by itself.
        of_all: whether all tracks are transcribed.
    """

    track: AudioTrack | None
    channels: Channels
    channel: str | None = None
    of_all: bool = False
    recording: Recording = field(default_factory=lambda: Recording(Path()))

    def stream(self, path: Path, rate: int, notes: list[str] | None = None) -> Iterator[Samples]:
        """Its samples; of a part of a file, those of the part."""
        if self.track is None:
            blocks: Iterator[Samples] = iter([memory_samples(self.recording, rate, self.channels)])
        else:
            blocks = stream_samples(path, rate, track=self.track.number, channels=self.channels, notes=notes)
        return part_of(blocks, self.recording.offset, self.recording.duration, rate)


@dataclass(slots=True)
class Plan:
    """The windows of one source, frames where somebody speaks, and its sound where it is short enough to keep."""

    source: Source
    windows: list[Window]
    total: int
    speech: NDArray[np.bool_]
    notes: list[str] = field(default_factory=list)
    kept: list[Samples] = field(default_factory=list)

    def speech_in(self, window: Window, rate: int) -> NDArray[np.bool_]:
        """(frames,) of a window whether somebody speaks."""
        size = round(rate * FRAME_SECONDS)
        return self.speech[window.start // size : -(-window.stop // size)]

    def cut(self, path: Path, rate: int) -> Iterator[Samples]:
        """The sound of every window."""
        # What mixing had to choose was said when the windows were planned.
        return cut(self.kept or self.source.stream(path, rate, []), self.windows)


def plan_sound(
    path: Path | Recording, rate: int, longest: float, track: TrackChoice, channels: ChannelChoice
) -> list[Plan]:
    """Finds where there is sound in what is to be transcribed of a recording.

    Args:
        path: The recording, or its file.
        rate: Samples per second.
        longest: Seconds of the longest window.
        track: A number from 1, a language, "all", or None for the default one.
        channels: "mix", "left", "right" or "each".

    Raises:
        AudioError: It cannot be read, or has no such track or channel.
    """
    recording = path if isinstance(path, Recording) else Recording(path)
    path = recording.path
    if recording.samples is not None:
        return [_plan(path, rate, longest, source) for source in _memory_sources(recording, channels)]
    tracks = audio_tracks(path)
    chosen = tracks if track == "all" else [choose_track(path, tracks, track)]
    sources = [source for each in chosen for source in _sources(each, channels, recording, of_all=track == "all")]
    plans = [_plan(path, rate, longest, source) for source in sources]
    if track is not None or any(plan.windows for plan in plans):
        return plans
    for other in tracks:
        if other is not chosen[0]:
            others = [_plan(path, rate, longest, source) for source in _sources(other, channels, recording)]
            if any(plan.windows for plan in others):
                others[0].notes.append(f"{chosen[0]} is silent; {other} was read; --track chooses")
                return others
    return plans


def missing_sound(recording: Recording, seconds: float) -> list[str]:
    """What is to be said of a part that is not in its file.

    Raises:
        AudioError: nothing of it is.
    """
    if recording.offset and not seconds:
        raise AudioError(recording.path, f"there is nothing at {recording.offset:.3f} s of it")
    if recording.duration is not None and seconds < recording.duration - LOST_SECONDS:
        return [f"of {recording.duration:.1f} s that were asked for there are {seconds:.1f}"]
    return []


def _memory_sources(recording: Recording, channels: ChannelChoice) -> list[Source]:
    if channels != "each":
        return [Source(None, channels, recording=recording)]
    count = len(_channels_first(recording))
    return [Source(None, n, channel_name(n, count), recording=recording) for n in range(1, count + 1)]


def memory_samples(recording: Recording, rate: int, channels: Channels) -> Samples:
    """Samples in memory as one channel at a rate.

    Raises:
        AudioError: They hold NaN, are empty or no numbers, or have no such channel or no possible rate.
    """
    samples = _channels_first(recording)
    middle = 0.0
    if samples.dtype.kind in "iu":
        scale = float(np.iinfo(samples.dtype).max)
        if samples.dtype.kind == "u":
            # Silence is the middle of unsigned numbers, as in WAV files of 8 bits.
            scale = middle = (scale + 1) / 2
    else:
        scale = 1.0
    samples = (samples.astype(np.float32) - np.float32(middle)) / np.float32(scale)
    number = {"left": 1, "right": 2}.get(str(channels), channels)
    if not bool(np.isfinite(samples).all()):
        raise AudioError(recording.path, "samples must be finite")
    if not RATES[0] <= recording.rate <= RATES[1]:
        raise AudioError(recording.path, f"a sample rate of {recording.rate} Hz")
    if isinstance(number, int) and number > len(samples):
        raise AudioError(recording.path, f"no channel {number}: there are {len(samples)}")
    mono = samples[number - 1] if isinstance(number, int) else samples.mean(0)
    return np.ascontiguousarray(resample(mono, recording.rate, rate))


def _channels_first(recording: Recording) -> NDArray[Any]:
    """(channels, n) of samples of any layout.

    Soundfile, librosa and scipy give (n, channels), torchaudio (channels, n). A recording has more samples than
    channels; averaged over the wrong axis it would be silence without a word.

    Raises:
        AudioError: They are no recording.
    """
    given: NDArray[Any] = np.asarray(recording.samples)
    samples = np.atleast_2d(given)
    if samples.ndim == 2 and samples.shape[0] > samples.shape[1]:
        samples = samples.T
    if samples.ndim != 2 or not samples.size or samples.dtype.kind not in "fiu" or len(samples) > MAX_CHANNELS:
        shapes = "(n,), (channels, n) or (n, channels)"
        reason = f"samples must be numbers of shape {shapes}, not {samples.dtype} {given.shape}"
        raise AudioError(recording.path, reason)
    return samples


def part_of(blocks: Iterator[Samples], offset: float, duration: float | None, rate: int) -> Iterator[Samples]:
    """The blocks between two seconds of a stream, which is read to the end only where all of it is wanted."""
    first = round(offset * rate)
    last = None if duration is None else first + round(duration * rate)
    at = 0
    for block in blocks:
        start, stop = max(0, first - at), len(block) if last is None else min(len(block), last - at)
        at += len(block)
        if start < stop:
            yield block[start:stop]
        if last is not None and at >= last:
            return


def _sources(track: AudioTrack, channels: ChannelChoice, recording: Recording, *, of_all: bool = False) -> list[Source]:
    if channels != "each":
        return [Source(track, channels, None, of_all, recording)]
    numbers = range(1, max(track.channels, 1) + 1)
    return [Source(track, n, channel_name(n, track.channels), of_all, recording) for n in numbers]


def _plan(path: Path, rate: int, longest: float, source: Source) -> Plan:
    plan = Plan(source, [], 0, np.zeros(0, dtype=bool))
    blocks = _keep_short(source.stream(path, rate, plan.notes), plan.kept, rate)
    model = load_vad() if rate == SAMPLE_RATE else None
    detector = None if model is None else SpeechDetector(model)
    levels, plan.total = frame_levels(blocks if detector is None else detector.through(blocks), rate)
    if plan.total / rate >= _MIN_SECONDS:
        if detector is None:
            plan.speech = sounding(levels)
        else:
            plan.speech = speech_frames(detector.probabilities, len(levels), rate // 50)
        plan.windows = plan_windows(levels, plan.total, rate, longest, plan.speech)
    if not plan.windows:
        plan.kept.clear()
    return plan


def _keep_short(blocks: Iterable[Samples], kept: list[Samples], rate: int) -> Iterator[Samples]:
    """Passes blocks on and fills `kept` with all of them, or with none if together they last too long."""
    samples = 0
    for block in blocks:
        samples += len(block)
        if samples <= _KEEP_SECONDS * rate:
            kept.append(block)
        else:
            kept.clear()
        yield block
