"""Frames of a video by their place in the order shown: PyAV, and decord for the kinds of file where it is proven equal.

PyAV's plain decoding from the first packet to the last is what every reader is measured by. Where a container has an
index (MP4, QuickTime, Matroska, WebM), it starts at the keyframe before the frame wanted; the first frame that comes
must be the one that keyframe stands for, and if it is not (periodic intra refresh), decoding starts at the beginning.
Every frame is known by its timestamp.

decord 0.6 is fast and returns other frames than asked for, without a word, where groups of pictures are open (the
defaults of x265, MPEG-2 and MPEG-4 with B frames, periodic intra refresh), where an edit list hides frames, and in AVI
and transport streams; it does not know AV1 and returns four interleaved channels for a rotated film. It is used when
asked for (`reader="decord"`), and then only for closed groups of pictures in MP4, QuickTime, Matroska or WebM, by the
codecs that `tests/multimodal/test_frame_matrix.py` proves frame for frame equal, all decided from the packets' headers.
Everything else goes through PyAV. Both give the same pixels up to rounding in the conversion from YUV.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenthrift import extras
from tokenthrift.media.errors import cause
from tokenthrift.media.picture_track import LOST_SECONDS, PictureTrack, VideoError, open_track

__all__ = ["Reader", "decode", "decord_is_exact"]

Pixels: TypeAlias = NDArray[np.uint8]
Reader: TypeAlias = Literal["pyav", "decord"]

_BATCH: Final = 8
_EXACT_CODECS: Final = ("h264", "hevc", "mpeg4", "mpeg2video", "vp8", "vp9")


def decode(
    track: PictureTrack, indices: Iterable[int], threads: int = 1, reader: Reader = "pyav"
) -> Iterator[tuple[int, Pixels]]:
    """The frames at ascending `indices`, one at a time, each with its index and (H, W, 3).

    Args:
        track: the film.
        indices: taken one by one, as frames are asked for.
        threads: of the decoder.
        reader: what decodes; see the file's docstring.

    Raises:
        VideoError: a frame cannot be decoded.
    """
    if reader == "decord":
        yield from _decord(track, iter(indices), threads)
    elif reader == "pyav":
        yield from _pyav(track, indices, threads)
    else:
        raise ValueError(f"there is no reader {reader!r}; pyav and decord are")


def decord_is_exact(track: PictureTrack) -> bool:
    """Whether decord is proven to return the frames asked for, by what the file's packets say of themselves."""
    return (
        track.closed
        and bool(track.seek_points)
        and track.rotation == 0
        and track.info.codec in _EXACT_CODECS
        and track.pts is not None
    )


def _decord(track: PictureTrack, indices: Iterator[int], threads: int) -> Iterator[tuple[int, Pixels]]:
    reader = _decord_reader(track, threads)
    while batch := list(islice(indices, _BATCH)):
        try:
            frames = None if reader is None else reader.get_batch(batch).asnumpy()
        except Exception:  # decord raises RuntimeError or an error of its own; PyAV decides what is wrong.
            frames = None
        if frames is None:
            yield from _pyav(track, chain(batch, indices), threads)
            return
        yield from zip(batch, frames, strict=True)


def _decord_reader(track: PictureTrack, threads: int) -> Any:
    if not decord_is_exact(track):
        return None
    try:
        decord = extras.require("decord")
    except extras.MissingExtraError:
        return None
    decord.logging.set_level(decord.logging.QUIET)
    info = track.info
    try:
        reader = decord.VideoReader(str(info.path), num_threads=threads)
        if len(reader) != info.frames:
            return None
        first = reader.next().asnumpy()
        reader.seek(0)
    except Exception:
        return None
    return reader if first.shape == (info.height, info.width, 3) else None


def _pyav(track: PictureTrack, indices: Iterable[int], threads: int) -> Iterator[tuple[int, Pixels]]:
    indices = iter(indices)
    with open_track(track.info.path) as (container, stream):
        stream.codec_context.thread_count = threads
        turned = track.rotation % 180 != 0
        height, width = (track.info.width, track.info.height) if turned else (track.info.height, track.info.width)
        walk, points = _Walk(track, container, stream), track.seek_points
        for index in indices:
            point = None if track.pts is None else _point_before(points, track.pts[index])
            # Frames up to the one that the seek would lead to are reached as fast by going on.
            if point is not None and track.pts is not None and bisect_left(track.pts, point) > walk.at + 1:
                container.seek(point, stream=stream)
                walk = _Walk(track, container, stream, point)
                if not walk.starts_right():
                    # Even the seek to the beginning may lead behind it, so the file is opened again.
                    yield from _pyav(replace(track, seek_points=()), chain([index], indices), threads)
                    return
            frame = walk.to(index)
            if frame is None:
                raise VideoError(track.info.path, f"corrupt: no pixels for the frame at {track.seconds[index]:.2f} s")
            pixels = frame.reformat(format="rgb24", width=width, height=height).to_ndarray()
            yield index, np.rot90(pixels, track.rotation // 90)


def _point_before(points: tuple[int, ...], pts: int) -> int | None:
    place = bisect_right(points, pts) - 1
    return points[place] if place >= 0 else None


class _Walk:
    """Forward through the frames that can be decoded from where the container stands.

    A frame that the decoder skips is replaced by the one before, as in every player: some files hold packets that only
    say "as before". A gap of more than half a second is damage. `at` is the number of the latest frame.
    """

    def __init__(self, track: PictureTrack, container: Any, stream: Any, point: int | None = None) -> None:
        self.at = -1
        self._track = track
        self._frame: Any = None
        self._before: tuple[int, Any] = (-1, None)
        self._frames = _forward(track, container, stream)
        self._point = point

    def starts_right(self) -> bool:
        """Whether the first frame from a seek point on is the one that it stands for; goes to that frame."""
        assert self._track.pts is not None
        assert self._point is not None
        wanted = bisect_left(self._track.pts, self._point)
        # Frames before it need a group of pictures that was not decoded.
        self._frames = ((number, frame) for number, frame in self._frames if number >= wanted)
        self._step()
        return self.at == wanted

    def to(self, index: int) -> Any:
        """The frame of this number, or its neighbor; None where both are too far."""
        times = self._track.seconds
        while self.at < index:
            self._step()
        if self.at == index:
            return self._frame
        for number, frame in (self._before, (self.at, self._frame)):
            if frame is not None and abs(times[number] - times[index]) <= LOST_SECONDS:
                return frame
        return None

    def _step(self) -> None:
        self._before = (self.at, self._frame)
        self.at, self._frame = next(self._frames, (len(self._track.seconds), None))


def _forward(track: PictureTrack, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Number and frame of everything that can be decoded from where the container stands."""
    numbers = None if track.pts is None else {pts: number for number, pts in enumerate(track.pts)}
    count, packets = 0, container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except Exception as error:
            raise VideoError(track.info.path, f"corrupt: {cause(error)}") from error
        try:
            decoded = packet.decode()
        except Exception:  # Players go on after a damaged packet; a frame that is missed is noticed by its number.
            continue
        for frame in decoded:
            number = count if numbers is None else numbers.get(frame.pts)
            count += 1
            if number is not None:
                yield number, frame
