"""The picture track of a file: when each frame is shown, known before one is decoded.

An MP4 of constant frame rate whose header is complete tells at once; of any other file (Matroska, AVI, fragmented MP4,
transport streams, a variable rate) the packets are read and none is decoded. Times are those of the file's own
timestamps, so that a variable frame rate is right; zero is the start of the whole file, where its sound starts too.

What a file that is not whole gives (decord and most readers of video datasets return what they can, or a black frame):
no picture track, only cover art, no frame, an end before the length that the header states by more than half a second,
or an MP4 or AVI that is shorter than its own index raise :class:`VideoError`. Damage inside of a frame shows only when
that frame is decoded. A mirrored display matrix is not applied, and pixels that are not square are not stretched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tokenthrift import extras
from tokenthrift.media.mp4 import display_rotation

__all__ = ["LOST_SECONDS", "PictureTrack", "VideoError", "VideoInfo", "cause", "open_track", "probe", "read_track"]

LOST_SECONDS: Final = 0.5
"""Less than this may be missing of a whole file."""
# A file whose header asks for more is broken or hostile: one frame would not fit in memory.
_LARGEST_SIDE: Final = 32_768


class VideoError(ValueError):
    """A file that gives no whole video; `path` is the file and `reason` says why, fit for a report."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """What a video is, as far as its header and its packets tell."""

    path: Path
    seconds: float
    """From the start of the first frame to the end of the last."""
    frames: int
    fps: float
    """Frames per second on average; they need not be evenly spread."""
    height: int
    """In pixels, as shown: after the rotation that the file asks for."""
    width: int
    codec: str
    """FFmpeg's name, such as h264."""
    audio: bool
    """Whether there is a sound track too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTrack:
    """Every frame of a video in the order shown.

    Attributes:
        info: what `probe` tells.
        container: FFmpeg's names of the format, such as mov,mp4,m4a,3gp,3g2,mj2.
        pts: the timestamp of every frame, ascending, in units of the stream; None where the file gives none, and
            frames are counted instead.
        seconds: when every frame appears.
        keyframes: which frames decoding can start at.
    """

    info: VideoInfo
    container: str
    pts: tuple[int, ...] | None
    seconds: tuple[float, ...]
    keyframes: tuple[int, ...]


def probe(path: str | Path) -> VideoInfo:
    """Tells length, size and frame count of a video; decodes no frame.

    Args:
        path: a video file of any common format.

    Raises:
        VideoError: there is no picture track, or the file is damaged, cut short or empty.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    with open_track(path) as (container, stream):
        if (times := _header_times(path, container, stream)) is not None:
            return _info(path, container, stream, *times)
    return read_track(path).info


def read_track(path: str | Path) -> PictureTrack:
    """Reads the timestamps of all frames; decodes none.

    Raises:
        VideoError: as in `probe`.
        MissingExtraError: PyAV is not installed.
    """
    path = Path(path)
    with open_track(path) as (container, stream):
        found = _packets(path, container, stream)
        if not found:
            raise VideoError(path, "empty: the picture track holds no frame")
        unit = stream.time_base
        zero = Fraction(container.start_time or 0, 1_000_000)
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        times: list[Fraction]
        if all(pts is not None for pts, _, _ in found):
            found = sorted({packet[0]: packet for packet in found}.values())
            pts = tuple(p for p, _, _ in found)
            times = [p * unit - zero for p in pts]
        else:
            pts, times = None, [i / rate for i in range(len(found))]
        usual = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / rate
        length = Fraction(times[-1] - times[0] + (found[-1][2] * unit or usual))
        stated = _stated_seconds(container, stream)
        if stated is not None and float(stated - length) > min(LOST_SECONDS, float(stated) / 2):
            raise VideoError(path, f"cut short: frames for {float(length):.1f} s of {float(stated):.1f} s")
        info = _info(path, container, stream, len(times), length)
        keys = tuple(i for i, (_, key, _) in enumerate(found) if key)
        return PictureTrack(
            info=info,
            container=container.format.name,
            pts=pts,
            seconds=tuple(map(float, times)),
            keyframes=keys,
        )


@contextmanager
def open_track(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its picture stream.

    Raises:
        VideoError: there is none.
    """
    av = extras.require("av")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(12)
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from error
    if not size:
        raise VideoError(path, "empty: a file of 0 bytes")
    # The first chunk of an AVI states its length; when it was cut, FFmpeg only shortens the index.
    if magic[:4] == b"RIFF" and magic[8:] == b"AVI " and int.from_bytes(magic[4:8], "little") + 8 > size + 1:
        raise VideoError(path, f"cut short: {size} bytes of {int.from_bytes(magic[4:8], 'little') + 8}")
    # "file:" and the whitelist keep a hostile playlist or file name from opening a network address.
    try:
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except Exception as error:  # On random bytes PyAV also raises ZeroDivisionError and EOFError.
        raise VideoError(path, f"not a video of a known format, or damaged: {cause(error)}") from error
    with container:
        yield container, _picture_stream(path, container)


def cause(error: Exception) -> str:
    """FFmpeg's words without the error number and the path, which the report states anyway."""
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _picture_stream(path: Path, container: Any) -> Any:
    av = extras.require("av")
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = "only cover art" if container.streams.video else "the file holds no picture track"
        raise VideoError(path, f"no video: {what}")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(path, "no decoder for its picture track")
    if not (0 < context.width <= _LARGEST_SIDE and 0 < context.height <= _LARGEST_SIDE):
        raise VideoError(path, f"corrupt: frames of {context.width} x {context.height} pixels")
    return stream


def _header_times(path: Path, container: Any, stream: Any) -> tuple[int, Fraction] | None:
    """Frames and seconds of an MP4 whose header holds its whole index, if its frames are evenly spread."""
    entries = stream.index_entries
    if "mp4" not in container.format.name or not stream.duration or not 0 < stream.frames == len(entries):
        return None
    size, shown, end, decoded = path.stat().st_size, 0, 0, []
    for entry in entries:
        shown += not entry.is_discard
        end = max(end, entry.pos + entry.size)
        decoded.append(entry.timestamp)
    if end > size:
        raise VideoError(path, f"cut short: {size} bytes of {end}")
    gaps = [later - earlier for earlier, later in pairwise(decoded)]
    # The index orders frames as decoded, and where they are uneven that does not tell when they are shown.
    if gaps and max(gaps) - min(gaps) > 1:
        return None
    return shown, stream.duration * stream.time_base


def _packets(path: Path, container: Any, stream: Any) -> list[tuple[Any, bool, int]]:
    """Timestamp, whether a keyframe, and duration of every packet that holds a frame which is shown."""
    found: list[tuple[Any, bool, int]] = []
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return found
        except Exception as error:
            raise VideoError(path, f"corrupt or cut short after {len(found)} frames: {cause(error)}") from error
        if packet.size and not packet.is_discard:
            found.append((packet.pts, packet.is_keyframe, packet.duration or 0))


def _stated_seconds(container: Any, stream: Any) -> Fraction | None:
    """Length of the picture track by the header, for the containers whose headers can be trusted to state it."""
    formats = container.format.name.split(",")
    if "mp4" in formats and stream.duration:
        return Fraction(stream.duration * stream.time_base)
    if "matroska" in formats:
        if tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(Fraction, tag.groups())
            return hours * 3600 + minutes * 60 + seconds
        if len(container.streams) == 1 and container.duration is not None:
            return Fraction(container.duration, 1_000_000)
    return None


def _info(path: Path, container: Any, stream: Any, frames: int, seconds: Fraction) -> VideoInfo:
    height, width = stream.codec_context.height, stream.codec_context.width
    if "mp4" in container.format.name and display_rotation(path) % 180:
        height, width = width, height
    return VideoInfo(
        path=path,
        seconds=float(seconds),
        frames=frames,
        fps=float(frames / seconds),
        height=height,
        width=width,
        codec=stream.codec_context.codec.canonical_name,
        audio=bool(container.streams.audio),
    )
