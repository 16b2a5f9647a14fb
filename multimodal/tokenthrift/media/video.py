"""Video files to frames: uint8 tensors with the time at which each frame is shown.

    frames = read_frames("clip.mp4", count=16, size=(384, 384))
    frames.pixels, frames.seconds      # (16, 3, 384, 384) uint8, (16,) float64

What is promised of every file that is read, whatever decodes it:

- A frame is what a player shows at that time. Frames that an edit list hides are not there, the timestamps of the
  container rule, and where a packet holds no frame the one before stays on screen. Interlaced frames come whole, both
  fields woven together, and an animation is a film.
- A time is in seconds from the start of the presentation of the whole file (`container`), the same instant for
  `read_audio`, `read_frames` and lips.
- A color is red, green and blue from 0 to 255 by the matrix and the range that the file states, BT.601 and limited
  range where it states none; 10 bits and more are rounded to 8. Transfer curves (HDR) are left as they are, alpha is
  dropped, pixels that are not square are not stretched, and the rotation by quarters that a file asks for is done.

Whole files are never held: frames are decoded one at a time and resized at once, so memory is that of the result, and
of one chunk for `stream_frames`. A result of more than `MAX_BYTES` is refused before a frame is decoded. Reads with one
thread unless told, as data loaders start many readers.

`count` spreads frames as the published LLaVA-OneVision and VQToken evaluation does, `linspace(0, n - 1, count)` rounded
down; unlike there, a clip of fewer frames gives each of them once instead of copies. Resizing is bicubic with
antialiasing in torch, so that every decoder gives the same (the published code resizes with PIL).

See `picture_track` for what damaged files give, and `decoders` for what decodes. `docs/media.md` names the test of
every promise.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenthrift.media.decoders import Reader, decode
from tokenthrift.media.picture_track import PictureTrack, VideoError, VideoInfo, probe, read_track

__all__ = ["Frames", "VideoError", "VideoInfo", "probe", "read_frames", "read_frames_at", "spread", "stream_frames"]


# Timestamps such as 1001/30000 are rounded to ticks, so a frame may begin a little after the time it stands for.
_TICK: Final = 1e-3
MAX_BYTES: Final = 4 << 30
"""Most bytes of the frames that one call returns; a small file can hold very many large ones."""


class Frames(NamedTuple):
    """Frames in the order asked for.

    Attributes:
        pixels: (T, 3, H, W) uint8, RGB.
        seconds: (T,) float64, when each appears; zero is the start of the file. In a stream at a fixed rate, the time
            each stands for.
    """

    pixels: Tensor
    seconds: Tensor


def read_frames(
    path: str | Path,
    *,
    count: int | None = None,
    indices: Sequence[int] | None = None,
    seconds: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    threads: int = 1,
    reader: Reader = "pyav",
) -> Frames:
    """Reads some frames of a video, named in one of three ways.

    Args:
        path: a video file of any common format.
        count: this many, spread evenly; all of them where there are fewer.
        indices: by place in the order shown, from 0, in any order; negative ones count from the end.
        seconds: those on screen at these times; before the first frame that is the first.
        size: height and width to resize to; as stored if not given.
        threads: of the decoder.
        reader: "decord" reads the kinds of file for which it is proven to give the same frames, PyAV all others.

    Raises:
        VideoError: the file has no picture track, is damaged, cut short or empty, or shows nothing at a time asked for.
        IndexError: there is no frame of that index.
        MissingExtraError: PyAV is not installed.
    """
    if sum(way is not None for way in (count, indices, seconds)) != 1:
        raise ValueError("name frames by exactly one of count, indices and seconds")
    track = read_track(path)
    if count is not None:
        wanted = spread(track.info.frames, min(count, track.info.frames))
    elif indices is not None:
        wanted = [_place(track, index) for index in indices]
    else:
        wanted = [_shown(track, second) for second in seconds or ()]
    height, width = size or (track.info.height, track.info.width)
    _check_bytes(track, len(wanted), height, width)
    distinct = sorted(set(wanted))
    slots = {index: slot for slot, index in enumerate(distinct)}
    frames = decode(track, distinct, threads, reader)
    pixels = torch.empty(len(distinct), 3, height, width, dtype=torch.uint8)
    for slot, frame in enumerate(_repeated(frames, distinct, size)):
        pixels[slot] = frame
    order = torch.tensor([slots[index] for index in wanted], dtype=torch.int64)
    times = torch.tensor([track.seconds[index] for index in wanted], dtype=torch.float64)
    return Frames(pixels if wanted == distinct else pixels[order], times)


def read_frames_at(
    path: str | Path,
    fps: float,
    *,
    size: tuple[int, int] | None = None,
    threads: int = 1,
    reader: Reader = "pyav",
) -> Frames:
    """Reads a whole video at a fixed rate: frame k is what is on screen k / `fps` seconds after the start of the file.

    That start is also where `read_audio` of the same file begins.

    Args:
        path: a video file of any common format.
        fps: frames per second wanted; frames are repeated or left out, never blended.
        size: height and width to resize to; as stored if not given.
        threads: of the decoder.
        reader: "decord" reads the kinds of file for which it is proven to give the same frames, PyAV all others.

    Raises:
        VideoError, MissingExtraError: as in `read_frames`.
    """
    track = read_track(path)
    height, width = size or (track.info.height, track.info.width)
    _check_bytes(track, _moment_count(track, _checked_rate(fps)), height, width)
    moments = list(_moments(track, fps))
    pixels = torch.empty(len(moments), 3, height, width, dtype=torch.uint8)
    frames = decode(track, _distinct(index for index, _ in moments), threads, reader)
    for slot, frame in enumerate(_repeated(frames, (index for index, _ in moments), size)):
        pixels[slot] = frame
    return Frames(pixels, torch.tensor([second for _, second in moments], dtype=torch.float64))


def stream_frames(
    path: str | Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    chunk: int = 16,
    threads: int = 1,
    reader: Reader = "pyav",
) -> Iterator[Frames]:
    """Reads a whole video piece by piece, in memory that does not grow with its length.

    Args:
        path: a video file of any common format.
        fps: a fixed rate, as in `read_frames_at`; every frame at its own time if not given.
        size: height and width to resize to; as stored if not given.
        chunk: most frames in a piece.
        threads: of the decoder.
        reader: "decord" reads the kinds of file for which it is proven to give the same frames, PyAV all others.

    Yields:
        Up to `chunk` frames, never none.

    Raises:
        VideoError, MissingExtraError: as in `read_frames`.
    """
    if chunk < 1:
        raise ValueError(f"a chunk is at least one frame, not {chunk}")
    track = read_track(path)
    fps = None if fps is None else _checked_rate(fps)
    wanted, decoded, times = tee(_moments(track, fps), 3)
    frames = decode(track, _distinct(index for index, _ in decoded), threads, reader)
    for pixels in _chunks(frames, (index for index, _ in wanted), size, chunk):
        seconds = [second for _, second in islice(times, len(pixels))]
        yield Frames(pixels, torch.tensor(seconds, dtype=torch.float64))


def spread(frames: int, count: int) -> list[int]:
    """Places of `count` frames spread evenly over a clip of `frames`, both ends among them; of one frame, the first.

    As published, `linspace` rounded down: where its floating-point steps fall just short of a whole number (31 frames
    at 23 places, never at 8, 16 or 32), that is the frame before. More places than frames name some of them again.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"a count of frames is at least 1, not {count}")
    return [int(place) for place in np.linspace(0, frames - 1, count)]


def _checked_rate(fps: float) -> float:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is a positive number of frames per second, not {fps}")
    return fps


def _check_bytes(track: PictureTrack, count: int, height: int, width: int) -> None:
    total = 3 * count * height * width
    if total > MAX_BYTES:
        what = f"{count} frames of {width} x {height} take {total / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.1f} are"
        raise VideoError(track.info.path, f"{what} returned at once: name fewer, a size, or use stream_frames")


def _place(track: PictureTrack, index: int) -> int:
    frames = track.info.frames
    if not -frames <= index < frames:
        raise IndexError(f"{track.info.path} has {frames} frames, none of index {index}")
    return index % frames


def _shown(track: PictureTrack, second: float) -> int:
    end = track.seconds[0] + track.info.seconds
    if not 0 <= second <= end:
        raise VideoError(track.info.path, f"nothing is shown at {second} s of {end:.2f} s")
    return _at(track, second)


def _at(track: PictureTrack, second: float) -> int:
    return max(bisect_right(track.seconds, second + _TICK) - 1, 0)


def _moments(track: PictureTrack, fps: float | None) -> Iterator[tuple[int, float]]:
    """The frame on screen, and the time, of every frame or of every moment of a fixed rate."""
    if fps is None:
        yield from enumerate(track.seconds)
        return
    index = 0
    for second in (moment / fps for moment in range(_moment_count(track, fps))):
        while index + 1 < track.info.frames and track.seconds[index + 1] <= second + _TICK:
            index += 1
        yield index, second


def _moment_count(track: PictureTrack, fps: float) -> int:
    return max(round((track.seconds[0] + track.info.seconds) * fps), 1)


def _distinct(ascending: Iterable[int]) -> Iterator[int]:
    before = -1
    for index in ascending:
        if index != before:
            yield index
        before = index


def _chunks(
    decoded: Iterator[tuple[int, np.ndarray]], ascending: Iterable[int], size: tuple[int, int] | None, chunk: int
) -> Iterator[Tensor]:
    """(T, 3, H, W) pieces of the frames at ascending, possibly repeated indices."""
    repeats = _repeated(decoded, ascending, size)
    while piece := list(islice(repeats, chunk)):
        yield torch.stack(piece)


def _repeated(
    decoded: Iterator[tuple[int, np.ndarray]], ascending: Iterable[int], size: tuple[int, int] | None
) -> Iterator[Tensor]:
    at, pixels = -1, torch.empty(0)
    for index in ascending:
        if index != at:
            at, frame = next(decoded)
            pixels = _resized(torch.from_numpy(np.ascontiguousarray(frame)), size)
        yield pixels


def _resized(frame: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(H, W, 3) to (3, h, w)."""
    frame = frame.permute(2, 0, 1)
    if size is None or frame.shape[1:] == size:
        return frame.contiguous()
    return interpolate(frame[None], size, mode="bicubic", antialias=True)[0].contiguous()
