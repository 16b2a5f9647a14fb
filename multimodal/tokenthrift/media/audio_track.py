"""The audio tracks of a container: which there are, and one of them as samples on the clock of the whole file.

Decoded frames are laid where their timestamps say. Up to a twentieth of a second they follow each other regardless,
because many containers round their timestamps; beyond that, silence fills what is missing and what overlaps is
trimmed. The start is exact to the sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import soundfile
from numpy.typing import NDArray

from tokenthrift.media import matroska
from tokenthrift.media.container import LOST_SECONDS, opened, preferred, start_of
from tokenthrift.media.errors import MediaError, cause, check_file
from tokenthrift.media.suffixes import RAW_FORMATS

__all__ = [
    "MAX_CHANNELS",
    "AudioError",
    "AudioTrack",
    "audio_tracks",
    "check_length",
    "choose_track",
    "decode_track",
    "reads_by_libsndfile",
]

Samples: TypeAlias = NDArray[np.float32]
Block: TypeAlias = tuple[int, Samples]
"""Samples per second, and (samples, channels)."""

_SNDFILE_MAGIC: Final = (b"RIFF", b"RF64", b"RIFX", b"riff", b"fLaC", b"OggS", b"FORM", b"caff", b".snd")
_SLACK_SECONDS: Final = 0.05
# Silence that a file may ask for: an hour, and ten times its sound. Damaged timestamps can ask for centuries.
_SILENT_SECONDS: Final = 3600
_SILENT_SHARE: Final = 10
_SILENT_BLOCK: Final = 65_536
MAX_CHANNELS: Final = 64
"""Most channels of a recording; a header can claim 65,535."""


class AudioError(MediaError):
    """A file that gives no whole recording; `path` is the file and `reason` says why, fit for a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioTrack:
    """A sound track of a file.

    Attributes:
        number: among the sound tracks, from 1.
        of: how many there are.
        language: as the file states it, such as eng; empty where it does not.
        title: likewise.
        default: whether a player takes it.
        channels: how many.
    """

    number: int
    of: int
    language: str
    title: str
    default: bool
    channels: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        named = [part for part in (self.language, self.title) if part]
        return f"track {self.number} of {self.of}" + (f" ({', '.join(named)})" if named else "")


def reads_by_libsndfile(path: Path) -> bool:
    """Whether libsndfile is to try the file: by its first bytes, and Ogg only where it holds a single stream.

    Raises:
        AudioError: it cannot be read, or is empty.
    """
    check_file(path, AudioError)
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise AudioError(path, f"cannot be read: {error.strerror}") from error
    if not head:
        raise AudioError(path, "empty: a file of 0 bytes")
    # The sixth byte of an Ogg page has bit 2 set where a stream begins; all streams begin before any goes on.
    starts = sum(1 for page in head.split(b"OggS")[1:] if len(page) > 1 and page[1] & 2)
    return head[:4] in _SNDFILE_MAGIC and not (head[:4] == b"OggS" and starts > 1)


def audio_tracks(path: str | Path) -> list[AudioTrack]:
    """The sound tracks of a file, from its header.

    Raises:
        AudioError: the file cannot be read, or has none.
    """
    path = Path(path)
    if reads_by_libsndfile(path) and (channels := _sndfile_channels(path)):
        return [AudioTrack(number=1, of=1, language="", title="", default=True, channels=channels)]
    with _container(path) as container:
        return _tracks(path, container)


def decode_track(path: Path, track: int | str | None = None) -> Iterator[Block]:
    """Samples of a track, from second 0 of the file on.

    Args:
        path: the file.
        track: its number from 1, its language, or None for the default one.

    Raises:
        AudioError: the file cannot be read, is damaged or cut short, or has no such track.
    """
    with _container(path) as container:
        tracks = _tracks(path, container)
        stream = container.streams.audio[choose_track(path, tracks, track).number - 1]
        yield from _Clock(path, container, stream).blocks()


def check_length(path: Path, *, stated: float, decoded: float) -> None:
    """Raises AudioError where more is missing than a codec's rounding."""
    if stated - decoded > min(LOST_SECONDS, stated / 2):
        raise AudioError(path, f"corrupt or cut short: {decoded:.1f} s of {stated:.1f} s could be decoded")


def _container(path: Path) -> Any:
    form, rate = RAW_FORMATS.get(path.suffix.lower(), (None, 0))
    return opened(path, AudioError, "a recording", form=form, options={"sample_rate": str(rate)} if rate else None)


def _tracks(path: Path, container: Any) -> list[AudioTrack]:
    streams = container.streams.audio
    if not streams:
        raise AudioError(path, "no audio: the file holds no audio track")
    first = preferred(streams)
    return [
        AudioTrack(
            number=number,
            of=len(streams),
            language=_said(stream.metadata.get("language", "")),
            title=stream.metadata.get("title", ""),
            default=stream is first or stream.index == first.index,
            channels=0 if stream.codec_context is None else stream.codec_context.layout.nb_channels,
        )
        for number, stream in enumerate(streams, 1)
    ]


def _sndfile_channels(path: Path) -> int:
    with path.open("rb") as handle:
        try:
            with soundfile.SoundFile(handle.fileno(), closefd=False) as file:
                return int(file.channels)
        except soundfile.LibsndfileError:
            return 0


def _said(language: str) -> str:
    return "" if language == "und" else language


def choose_track(path: Path, tracks: list[AudioTrack], track: int | str | None) -> AudioTrack:
    """The track of a number or language, or the default one.

    Raises:
        AudioError: there is none.
    """
    if track is None:
        return next(each for each in tracks if each.default)
    for each in tracks:
        language = each.language.lower()
        if track == each.number or (isinstance(track, str) and language and language == track.lower()):
            return each
    # en for eng, de-AT for deu and the like: the first two letters are the same in most languages.
    alike = [
        t for t in tracks if isinstance(track, str) and len(track) == 2 and t.language[:2].lower() == track.lower()
    ]
    if len(alike) == 1:
        return alike[0]
    raise AudioError(path, f"no audio track {track}: it has {'; '.join(map(str, tracks))}")


class _Clock:
    """Lays the decoded frames of a track where their timestamps say."""

    def __init__(self, path: Path, container: Any, stream: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.zero = start_of(path, container)
        self.lost = 0.0
        self.damaged = False
        self.rate = 0
        self.position = 0  # samples given since `origin`
        self.origin = Fraction(0)
        self.sound = self.silence = 0.0

    @property
    def now(self) -> Fraction:
        """Seconds of the file up to which samples were given."""
        return self.origin + (Fraction(self.position, self.rate) if self.rate else 0)

    def blocks(self) -> Iterator[Block]:
        end = first = None
        for frame in self._frames():
            rate = frame.sample_rate
            if rate != self.rate:
                self.origin, self.position, self.rate = self.now, 0, rate
            samples = _samples(self.path, frame)
            if frame.pts is not None and frame.time_base is not None:
                start = frame.pts * frame.time_base - self.zero
                first = start if first is None else first
                samples, gap = self._placed(samples, start, exact=not self.sound)
                while gap > 0:
                    part = min(gap, _SILENT_BLOCK)
                    yield rate, np.zeros((part, samples.shape[1]), dtype=np.float32)
                    gap -= part
                    self.position += part
            self.sound += len(samples) / rate
            self.position += len(samples)
            end = self.now
            if len(samples):
                yield rate, samples
        if self.damaged and not self.sound:
            raise AudioError(self.path, "corrupt: nothing in it could be decoded")
        self._check(float(first or 0), float(end or 0))

    def _placed(self, samples: Samples, start: Fraction, *, exact: bool) -> tuple[Samples, int]:
        """What of the samples is given, and how many samples of silence come before."""
        ahead = start - self.now
        if abs(ahead) <= (Fraction(1, 2 * self.rate) if exact else _SLACK_SECONDS):
            return samples, 0
        gap = round(ahead * self.rate)
        if gap < 0:
            if gap < -self.rate and not exact:
                second = float(self.now)
                reason = f"its timestamps start again after {second:.1f} s, as in files joined byte by byte"
                raise AudioError(self.path, reason)
            return samples[-gap:], 0
        self.silence += float(ahead)
        if self.silence > _SILENT_SECONDS + _SILENT_SHARE * self.sound:
            reason = f"corrupt: its timestamps leave {float(ahead):,.0f} s without sound after {float(self.now):.1f} s"
            raise AudioError(self.path, reason)
        # FFmpeg goes on behind damage in Matroska without a word, and what was lost looks like a pause.
        looks_lost = ahead > LOST_SECONDS and not exact and "matroska" in self.container.format.name
        if looks_lost and (place := matroska.first_damage(self.path)) is not None:
            raise AudioError(self.path, f"corrupt: damaged at byte {place}, {float(ahead):.1f} s are lost")
        return samples, gap

    def _frames(self) -> Iterator[Any]:
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except Exception as error:
                reason = f"corrupt or cut short after {float(self.now):.1f} s: {cause(error)}"
                raise AudioError(self.path, reason) from error
            try:
                frames = packet.decode()
            except Exception:  # Players go on after a damaged packet; what it held is counted and judged at the end.
                self.damaged = True
                self.lost += float((packet.duration or 0) * packet.time_base) if packet.time_base else 0.0
                continue
            yield from frames

    def _check(self, first: float, end: float) -> None:
        if self.lost > min(LOST_SECONDS, (self.sound + self.lost) / 2):
            raise AudioError(
                self.path, f"corrupt: {self.lost:.1f} s of {self.sound + self.lost:.1f} s could not be decoded"
            )
        formats = self.container.format.name.split(",")
        duration = self.stream.duration
        if duration is not None and ("mp4" in formats or ("mp3" in formats and _has_info_frame(self.path))):
            check_length(self.path, stated=float(duration * self.stream.time_base), decoded=end - max(first, 0.0))


def _has_info_frame(path: Path) -> bool:
    """Whether an MP3 file counts its frames in its first one (Xing, LAME); FFmpeg only guesses the length otherwise."""
    with path.open("rb") as file:
        tag = file.read(10)
        is_tag = tag[:3] == b"ID3" and len(tag) == 10
        # The size of an ID3 tag (its pictures, mostly) is written in four bytes of seven bits.
        file.seek(
            10 + sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            if is_tag
            else 0
        )
        first = file.read(256)
    return b"Xing" in first or b"Info" in first


def _samples(path: Path, frame: Any) -> Samples:
    """(samples, channels) float32 from a frame of any sample format."""
    count = frame.layout.nb_channels
    if frame.format.name in ("s64", "s64p"):  # for which PyAV has no array
        length = frame.samples if frame.format.is_planar else frame.samples * count
        data = np.stack([np.frombuffer(plane, np.int64)[:length] for plane in frame.planes])
    else:
        data = frame.to_ndarray()
    if not 1 <= count <= MAX_CHANNELS:
        raise AudioError(path, f"corrupt: {count} channels")
    data = data.T if frame.format.is_planar else data.reshape(-1, count)
    if data.dtype == np.uint8:
        return np.asarray((data.astype(np.float32) - 128) / 128, dtype=np.float32)
    if data.dtype.kind == "i":
        return np.asarray(data.astype(np.float32) / -float(np.iinfo(data.dtype).min), dtype=np.float32)
    return np.asarray(data, dtype=np.float32)
