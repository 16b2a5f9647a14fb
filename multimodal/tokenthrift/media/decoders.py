"""Frames of a video by their place in the order shown, decoded by decord where it can and by PyAV where it cannot.

decord reads MP4, QuickTime, Matroska and AVI when it agrees with the packets about when every frame is shown. decord
0.6 does not know AV1, returns four interleaved channels for a rotated video, and in a transport stream returns other
frames than asked for without a word. Those, every other container, and every platform without decord go through PyAV:
where there is an index, a seek to the keyframe before, then forward, checked by timestamp. Both give the same pixels up
to rounding in the conversion from YUV.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift import extras
from tokenthrift.media.picture_track import LOST_SECONDS, PictureTrack, VideoError, cause, open_track

__all__ = ["decode"]

Pixels = NDArray[np.uint8]

_BATCH: Final = 8
_EXACT: Final = ("mp4", "matroska", "avi")
# decord and PyAV round the same timestamps to seconds in their own ways.
_SAME_SECONDS: Final = 2e-3


def decode(track: PictureTrack, indices: Sequence[int], threads: int) -> Iterator[Pixels]:
    """The frames at ascending `indices`, one at a time, each (H, W, 3).

    Raises:
        VideoError: a frame cannot be decoded.
    """
    done = 0
    for pixels in _decord(track, indices, threads):
        done += 1
        yield pixels
    if done < len(indices):
        yield from _pyav(track, indices[done:], threads)


def _decord(track: PictureTrack, indices: Sequence[int], threads: int) -> Iterator[Pixels]:
    """As many of the frames as decord can give, from the first on."""
    reader = _decord_reader(track, threads)
    if reader is None:
        return
    for start in range(0, len(indices), _BATCH):
        try:
            batch = reader.get_batch(list(indices[start : start + _BATCH])).asnumpy()
        except Exception:  # decord raises RuntimeError or an error of its own; PyAV decides what is wrong.
            return
        yield from batch


def _decord_reader(track: PictureTrack, threads: int) -> Any:
    if not _is_exact(track):
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
        times = np.asarray(reader.get_frame_timestamp(np.arange(info.frames)))[:, 0]
        if np.abs((times - times[0]) - (np.asarray(track.seconds) - track.seconds[0])).max() > _SAME_SECONDS:
            return None
        reader.seek(0)
        first = reader.next().asnumpy()
        reader.seek(0)
    except Exception:
        return None
    return reader if first.shape == (info.height, info.width, 3) else None


def _is_exact(track: PictureTrack) -> bool:
    """Whether a container has an index, so that seeking leads to the keyframe meant."""
    return any(name in _EXACT for name in track.container.split(","))


def _pyav(track: PictureTrack, indices: Sequence[int], threads: int) -> Iterator[Pixels]:
    with open_track(track.info.path) as (container, stream):
        stream.codec_context.thread_count = threads
        size = {"width": stream.codec_context.width, "height": stream.codec_context.height}
        walk, sought = _Walk(track, container, stream), False
        for index in indices:
            start = track.keyframes[max(bisect_right(track.keyframes, index) - 1, 0)] if track.keyframes else 0
            if track.pts is not None and start > walk.at + 1 and _is_exact(track):
                container.seek(track.pts[start], stream=stream)
                walk, sought = _Walk(track, container, stream), True
            frame = walk.to(index)
            if sought and walk.first > start:  # The seek went too far, so begin at the beginning.
                container.seek(track.pts[0] if track.pts else 0, stream=stream)
                walk, sought = _Walk(track, container, stream), False
                frame = walk.to(index)
            if frame is None:
                raise VideoError(track.info.path, f"corrupt: no pixels for the frame at {track.seconds[index]:.2f} s")
            yield np.rot90(frame.reformat(format="rgb24", **size).to_ndarray(), round(frame.rotation / 90))


class _Walk:
    """Forward through the frames that can be decoded from where the container stands.

    A frame that the decoder skips is replaced by its neighbour, as in every player: some files hold packets that only
    say "as before", and timestamps that are off by one. A gap of more than half a second is damage. `first` and `at`
    are the numbers of the first and the latest frame.
    """

    def __init__(self, track: PictureTrack, container: Any, stream: Any) -> None:
        self.first = self.at = -1
        self._track = track
        self._frame: Any = None
        self._before: tuple[int, Any] = (-1, None)
        self._frames = _forward(track, container, stream)

    def to(self, index: int) -> Any:
        """The frame of this number, or its neighbour; None where both are too far."""
        times = self._track.seconds
        while self.at < index:
            self._before = (self.at, self._frame)
            self.at, self._frame = next(self._frames, (len(times), None))
            self.first = self.at if self.first < 0 else self.first
        near = [
            (abs(times[number] - times[index]), frame)
            for number, frame in (self._before, (self.at, self._frame))
            if frame is not None
        ]
        gap, frame = min(near, key=lambda pair: pair[0], default=(math.inf, None))
        return frame if gap <= LOST_SECONDS else None


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
