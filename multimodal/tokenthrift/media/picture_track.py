"""The picture track of a file: when each frame is shown, known before one is decoded.

An MP4 of constant frame rate whose header is complete tells at once; of any other file (Matroska, AVI, fragmented MP4,
transport streams, a variable rate) the packets are read and none is decoded. Times are those of the file's own
timestamps, so that a variable frame rate is right, and what an edit list hides is not there; zero is the start of the
whole file, where its sound starts too (see `container`). Of several picture tracks the default one is read.

What a file that is not whole gives (decord and most readers of video datasets return what they can, or a black frame):
no picture track, only cover art, no frame, or an end before the one that its own structure states raise
:class:`VideoError`. Damage inside of a frame shows only when that frame is decoded. A mirrored display matrix is not
applied, and pixels that are not square are not stretched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from tokenthrift import extras
from tokenthrift.media.container import LOST_SECONDS, MAX_PIXELS, display_rotation, opened, preferred, start_of
from tokenthrift.media.errors import MediaError, cause

__all__ = ["LOST_SECONDS", "PictureTrack", "VideoError", "VideoInfo", "open_track", "probe", "read_track"]

MAX_SECONDS: Final = 24 * 3600
"""Longest film; damaged timestamps can claim centuries."""


class VideoError(MediaError):
    """A file that gives no whole video; `path` is the file and `reason` says why, fit for a report."""


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
        seek_points: timestamps, ascending, from which decoding can start; empty where it must start at the beginning.
        closed: no frame before a keyframe needs it or comes after it in the file, none is hidden by an edit list, and
            every keyframe is one that a decoder may start at.
        rotation: degrees, counter-clockwise, by which decoded frames are turned.
    """

    info: VideoInfo
    container: str
    pts: tuple[int, ...] | None
    seconds: tuple[float, ...]
    seek_points: tuple[int, ...]
    closed: bool
    rotation: int


class _Packet(NamedTuple):
    pts: int | None
    dts: int | None
    key: bool
    hidden: bool
    duration: int
    restarts: bool


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
        if (times := _header_times(container, stream)) is not None:
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
        packets = _packets(path, container, stream)
        shown = [packet for packet in packets if not packet.hidden]
        if not shown:
            raise VideoError(path, "empty: the picture track holds no frame")
        unit, zero = stream.time_base, start_of(path, container)
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        times: list[Fraction]
        pts: tuple[int, ...] | None = None
        last = shown[-1].duration
        stamps = {packet.pts: packet.duration for packet in shown}
        if "avi" in container.format.name.split(","):
            # AVI says when a packet is decoded, not when its frame is shown; frames come out in that rhythm.
            decoded = sorted(packet.dts for packet in shown if packet.dts is not None)
            times = [stamp * unit - zero for stamp in decoded]
            if len(times) < len(shown):
                times = [i / rate for i in range(len(shown))]
        elif None not in stamps:
            pts = tuple(sorted(stamp for stamp in stamps if stamp is not None))
            _check_order(path, shown, unit)
            times, last = [stamp * unit - zero for stamp in pts], stamps[pts[-1]]
        else:
            times = [i / rate for i in range(len(shown))]
        usual = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / rate
        length = Fraction(times[-1] - times[0] + (last * unit or usual))
        if times[0] + length > MAX_SECONDS:
            raise VideoError(path, f"corrupt: its timestamps span {float(times[0] + length) / 3600:,.0f} hours")
        return PictureTrack(
            info=_info(path, container, stream, len(times), length),
            container=container.format.name,
            pts=pts,
            seconds=tuple(map(float, times)),
            seek_points=_seek_points(packets) if pts is not None and _has_index(container) else (),
            closed=_is_closed(packets),
            rotation=display_rotation(path, container.format.name),
        )


@contextmanager
def open_track(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its picture stream.

    Raises:
        VideoError: there is none.
    """
    with opened(path, VideoError, "a video") as container:
        yield container, _picture_stream(path, container)


def _picture_stream(path: Path, container: Any) -> Any:
    cover = extras.require("av").stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        what = "only cover art" if container.streams.video else "the file holds no picture track"
        raise VideoError(path, f"no video: {what}")
    stream = preferred(streams)
    context = stream.codec_context
    if context is None:
        raise VideoError(path, "no decoder for its picture track")
    if context.width < 1 or context.height < 1 or context.width * context.height > MAX_PIXELS:
        raise VideoError(path, f"corrupt: frames of {context.width} x {context.height} pixels")
    # Frames may grow on the way; the decoder refuses those as well.
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _header_times(container: Any, stream: Any) -> tuple[int, Fraction] | None:
    """Frames and seconds of an MP4 whose header holds its whole index, if its frames are evenly spread."""
    # PyAV before 16 does not show the index; the packets tell the same.
    entries = getattr(stream, "index_entries", None)
    if entries is None or "mp4" not in container.format.name or not 0 < stream.frames == len(entries):
        return None
    shown = sum(not entry.is_discard for entry in entries)
    decoded = [entry.timestamp for entry in entries]
    gaps = [later - earlier for earlier, later in pairwise(decoded)]
    # The index orders frames as decoded, and where they are uneven that does not tell when they are shown.
    if not gaps or not shown or gaps[0] < 1 or max(gaps) != min(gaps):
        return None
    seconds = shown * gaps[0] * stream.time_base
    return None if seconds > MAX_SECONDS else (shown, seconds)


def _packets(path: Path, container: Any, stream: Any) -> list[_Packet]:
    """What the packets that hold frames say of them, in the order of the file."""
    h264 = stream.codec_context.codec.canonical_name == "h264"
    found: list[_Packet] = []
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return found
        except Exception as error:
            raise VideoError(path, f"corrupt or cut short after {len(found)} frames: {cause(error)}") from error
        if packet.size:
            key, hidden = packet.is_keyframe, packet.is_discard
            restarts = key and not (h264 and not _is_idr(bytes(packet)))
            found.append(_Packet(packet.pts, packet.dts, key, hidden, packet.duration or 0, restarts))


def _is_idr(data: bytes) -> bool:
    """Whether an H.264 packet with 4-byte lengths holds a slice at which a decoder is reset (type 5)."""
    at = 0
    while at + 5 <= len(data):
        if data[at + 4] & 31 == 5:
            return True
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    return False


def _is_closed(packets: list[_Packet]) -> bool:
    key: int | None = None
    for packet in packets:
        if packet.hidden or packet.pts is None:
            return False
        if packet.key:
            key = packet.pts
            if not packet.restarts:
                return False
        elif key is None or packet.pts < key:
            return False
    return True


def _seek_points(packets: list[_Packet]) -> tuple[int, ...]:
    """Timestamps of all keyframes, those before the cut of an edit list included."""
    first = next(i for i, packet in enumerate(packets) if not packet.hidden)
    # Several stretches of an edit list run through the same timestamps, and a seek may lead into the wrong one.
    late = any(packet.hidden and packet.key for packet in packets[first:])
    decoded = [packet.dts for packet in packets if packet.dts is not None]
    ordered = all(before < after for before, after in pairwise(decoded))
    if late or not ordered:
        return ()
    return tuple(sorted(packet.pts for packet in packets if packet.key and packet.pts is not None))


def _check_order(path: Path, shown: list[_Packet], unit: Fraction) -> None:
    """Refuses files whose clock starts again, which are films joined byte by byte."""
    for before, after in pairwise(packet for packet in shown if packet.dts is not None):
        if before.dts is not None and after.dts is not None and (before.dts - after.dts) * unit > 1:
            second = float(before.dts * unit)
            raise VideoError(path, f"its timestamps start again after {second:.1f} s, as in files joined byte by byte")


def _has_index(container: Any) -> bool:
    """Whether a seek leads to the keyframe meant: proven for these containers, disproved for transport streams."""
    return any(name in ("mp4", "matroska") for name in container.format.name.split(","))


def _info(path: Path, container: Any, stream: Any, frames: int, seconds: Fraction) -> VideoInfo:
    height, width = stream.codec_context.height, stream.codec_context.width
    if display_rotation(path, container.format.name) % 180:
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
