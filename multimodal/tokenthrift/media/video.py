"""Video files to frames: uint8 tensors with the time at which each frame is shown.

    frames = read_frames("clip.mp4", count=16, size=(384, 384))
    frames.pixels, frames.seconds      # (16, 3, 384, 384) uint8, (16,) float64

Whole files are never held: frames are decoded a few at a time and resized at once, so memory is that of the result, and
of one chunk for `stream_frames`. Reads with one thread unless told, as data loaders start many readers.

`count` spreads frames as the published LLaVA-OneVision and VQToken evaluation does, `linspace(0, n - 1, count)` rounded
down; unlike there, a clip of fewer frames gives each of them once instead of copies. Resizing is bicubic with
antialiasing in torch, so that every decoder gives the same (the published code resizes with PIL).

See `picture_track` for what damaged files give, and `decoders` for what decodes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tokenthrift.media.decoders import decode
from tokenthrift.media.picture_track import PictureTrack, VideoError, VideoInfo, probe, read_track

__all__ = ["Frames", "VideoError", "VideoInfo", "probe", "read_frames", "read_frames_at", "spread", "stream_frames"]


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
) -> Frames:
    """Reads some frames of a video, named in one of three ways.

    Args:
        path: a video file of any common format.
        count: this many, spread evenly; all of them where there are fewer.
        indices: by place in the order shown, from 0, in any order; negative ones count from the end.
        seconds: those on screen at these times; before the first frame that is the first.
        size: height and width to resize to; as stored if not given.
        threads: of the decoder.

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
    distinct = sorted(set(wanted))
    slots = {index: slot for slot, index in enumerate(distinct)}
    chunks = list(_chunks(track, distinct, size, threads, chunk=16))
    if not chunks:
        height, width = size or (track.info.height, track.info.width)
        return Frames(torch.empty(0, 3, height, width, dtype=torch.uint8), torch.empty(0, dtype=torch.float64))
    order = torch.tensor([slots[index] for index in wanted])
    pixels = torch.cat(chunks)
    times = torch.tensor([track.seconds[index] for index in wanted], dtype=torch.float64)
    return Frames(pixels if wanted == distinct else pixels[order], times)


def read_frames_at(path: str | Path, fps: float, *, size: tuple[int, int] | None = None, threads: int = 1) -> Frames:
    """Reads a whole video at a fixed rate: frame k is what is on screen k / `fps` seconds after the start of the file.

    That start is also where `read_audio` of the same file begins.

    Args:
        path: a video file of any common format.
        fps: frames per second wanted; frames are repeated or left out, never blended.
        size: height and width to resize to; as stored if not given.
        threads: of the decoder.

    Raises:
        VideoError, MissingExtraError: as in `read_frames`.
    """
    return Frames(*map(torch.cat, zip(*stream_frames(path, fps=fps, size=size, threads=threads), strict=True)))


def stream_frames(
    path: str | Path,
    *,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    chunk: int = 16,
    threads: int = 1,
) -> Iterator[Frames]:
    """Reads a whole video piece by piece, in memory that does not grow with its length.

    Args:
        path: a video file of any common format.
        fps: a fixed rate, as in `read_frames_at`; every frame at its own time if not given.
        size: height and width to resize to; as stored if not given.
        chunk: most frames in a piece.
        threads: of the decoder.

    Yields:
        Up to `chunk` frames, never none.

    Raises:
        VideoError, MissingExtraError: as in `read_frames`.
    """
    if chunk < 1:
        raise ValueError(f"a chunk is at least one frame, not {chunk}")
    track = read_track(path)
    if fps is None:
        times: Sequence[float] = track.seconds
        wanted: Sequence[int] = range(track.info.frames)
    else:
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps is a positive number of frames per second, not {fps}")
        end = track.seconds[0] + track.info.seconds
        times = [k / fps for k in range(max(round(end * fps), 1))]
        wanted = [_at(track, time) for time in times]
    start = 0
    for pixels in _chunks(track, wanted, size, threads, chunk):
        yield Frames(pixels, torch.tensor(times[start : start + len(pixels)], dtype=torch.float64))
        start += len(pixels)


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
    # Timestamps such as 1001/30000 are rounded to ticks, so a frame may begin a little after the time it stands for.
    return max(bisect_right(track.seconds, second + 1e-3) - 1, 0)


def _chunks(
    track: PictureTrack, ascending: Sequence[int], size: tuple[int, int] | None, threads: int, chunk: int
) -> Iterator[Tensor]:
    """(T, 3, H, W) pieces of the frames at ascending, possibly repeated indices."""
    distinct = [index for slot, index in enumerate(ascending) if not slot or ascending[slot - 1] != index]
    decoded = zip(distinct, decode(track, distinct, threads), strict=True)
    repeats = (pixels for pixels in _repeated(decoded, ascending, size))
    while piece := list(islice(repeats, chunk)):
        yield torch.stack(piece)


def _repeated(
    decoded: Iterator[tuple[int, np.ndarray]], ascending: Sequence[int], size: tuple[int, int] | None
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
