"""The lips of a talking face: ordinary video to gray crops of 96 x 96 at 25 frames a second.

Source: the preparation of LRS3 in Llama-MTSK and AV-HuBERT: landmarks of each frame, gaps interpolated, smoothed over
12 frames, a 96-pixel crop about the mouth. What differs: the published tools need RetinaFace and FAN, two networks
whose weights lie on file hosts; here OpenCV's frontal face cascade finds the face and the mouth is where it is in a
frontal face, so a head turned far to the side is not followed.

What is given for what: other frame rates are resampled by showing at k / 25 s what is on screen then; a square video
of 88 to 96 pixels is a mouth crop already and is taken as it is; a face that is missed for a while is interpolated
between where it was and where it comes back; a face that stays away for more than half a second gives frames of the
mean gray, which the encoder reads as zeros, until it is back; a video in which no face is ever found raises
`FaceError`. Of several faces the largest is followed, chosen anew every
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenthrift import extras
from tokenthrift.media.video import probe, stream_frames
from tokenthrift.mtsk.planning import FRAMES_PER_SECOND

__all__ = ["CROP", "FaceError", "Lips", "mouth_path", "read_lips"]

CROP: Final = 96
MEAN_GRAY: Final = 107  # 0.421 of 255: zero to the encoder
_LOST_FRAMES: Final = FRAMES_PER_SECOND // 2
_SMOOTH_FRAMES: Final = 12
_DETECT_HEIGHT: Final = 360  # pictures are shrunk to this before the search; a smaller face is not found either way
# Of the cascade's box, whose side is the width of the face: the mouth's height in it, and the side of the crop.
_MOUTH_HEIGHT, _MOUTH_SIDE = 0.78, 0.52


class FaceError(ValueError):
    """A video in which no face was found; `path` is the file."""

    def __init__(self, path: str | Path, frames: int) -> None:
        super().__init__(path, frames)
        self.path, self.frames = Path(path), frames

    def __str__(self) -> str:
        return f"{self.path}: no face in any of {self.frames} frames; a frontal face is needed to find the lips"


class Lips(NamedTuple):
    """Mouth crops.

    Attributes:
        pixels: (T, 96, 96) uint8 gray at 25 frames a second; (T, side, side) where the video was a crop already.
        seen: (T,) bool, where the face was found.
    """

    pixels: Tensor
    seen: Tensor


def read_lips(path: str | Path) -> Lips:
    """The mouth crops of a video file, in memory that does not grow with the size of its frames.

    Args:
        path: a video file of any common format.

    Raises:
        FaceError: no face was found in any frame.
        VideoError: the file cannot be read, or has no picture.
        MissingExtraError: OpenCV or PyAV is not installed.
    """
    info = probe(path)
    if info.width == info.height and 88 <= info.width <= CROP:
        pixels = torch.cat([_gray(chunk.pixels) for chunk in stream_frames(path, fps=FRAMES_PER_SECOND)])
        return Lips(pixels, torch.ones(len(pixels), dtype=torch.bool))
    boxes: list[tuple[float, float, float] | None] = []
    finder = _FaceFinder()
    for chunk in stream_frames(path, fps=FRAMES_PER_SECOND):
        boxes += [finder.find(picture) for picture in _gray(chunk.pixels).numpy()]
    if not any(boxes):
        raise FaceError(path, len(boxes))
    squares, there = mouth_path(boxes)
    crops: list[Tensor] = []
    for chunk in stream_frames(path, fps=FRAMES_PER_SECOND):
        for picture in _gray(chunk.pixels).numpy():
            place = len(crops)
            lost = torch.full((CROP, CROP), MEAN_GRAY, dtype=torch.uint8)
            crops.append(_cut(picture, squares[place]) if there[place] else lost)
    return Lips(torch.stack(crops), torch.tensor([box is not None for box in boxes]))


def mouth_path(
    boxes: Sequence[tuple[float, float, float] | None],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Where the mouth is in every frame, from where a face was found in some.

    Args:
        boxes: left, top and side of the face in each frame, None where it was not found; not all of them None.

    Returns:
        (T, 3) center x, center y and side of the crop, interpolated and smoothed over 12 frames; and (T,) bool, false
        where the face has been away for more than half a second, from the first such frame to the last.
    """
    found = np.array([i for i, box in enumerate(boxes) if box is not None])
    face = np.array([box for box in boxes if box is not None], dtype=np.float64)
    middle = face[:, 0] + face[:, 2] / 2
    squares = np.stack([middle, face[:, 1] + _MOUTH_HEIGHT * face[:, 2], _MOUTH_SIDE * face[:, 2]], axis=1)
    time = np.arange(len(boxes))
    track = np.stack([np.interp(time, found, column) for column in squares.T], axis=1)
    there = np.ones(len(boxes), dtype=bool)
    # Gaps that are too long to guess; at the ends of a video the face may be away too.
    for before, after in zip([-1, *found], [*found, len(boxes)], strict=True):
        if after - before - 1 > _LOST_FRAMES:
            there[before + 1 : after] = False
    smooth = np.empty_like(track)
    for i in range(len(track)):
        smooth[i] = track[max(0, i - _SMOOTH_FRAMES // 2) : i + _SMOOTH_FRAMES // 2 + 1].mean(0)
    return smooth, there


class _FaceFinder:
    """The face of a picture: near the last one, and in all of the picture once a second or where it is not there."""

    def __init__(self) -> None:
        self.cv2 = extras.require("cv2")
        self.cascade: Any = self.cv2.CascadeClassifier(
            self.cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
        )
        self.last: tuple[int, int, int] | None = None
        self.number = 0

    def find(self, picture: NDArray[np.uint8]) -> tuple[float, float, float] | None:
        """Left, top and side in pixels of the picture, or None."""
        scale = min(1.0, _DETECT_HEIGHT / picture.shape[0])
        if scale < 1:
            picture = self.cv2.resize(picture, None, fx=scale, fy=scale, interpolation=self.cv2.INTER_AREA)
        # Once a second the whole picture is searched, so that the largest of several faces is followed.
        near = None if self.number % FRAMES_PER_SECOND == 0 else self._near(picture)
        self.number += 1
        self.last = near or self._largest(picture, max(24, min(picture.shape) // 8), max(picture.shape))
        return None if self.last is None else (self.last[0] / scale, self.last[1] / scale, self.last[2] / scale)

    def _near(self, picture: NDArray[np.uint8]) -> tuple[int, int, int] | None:
        """A face of about the size of the last, at most a quarter of its side away."""
        if self.last is None:
            return None
        x, y, side = self.last
        room = side // 4
        left, top = max(0, x - room), max(0, y - room)
        part = picture[top : y + side + room, left : x + side + room]
        found = self._largest(part, round(0.85 * side), round(1.18 * side))
        return None if found is None else (left + found[0], top + found[1], found[2])

    def _largest(self, picture: NDArray[np.uint8], least: int, most: int) -> tuple[int, int, int] | None:
        faces = self.cascade.detectMultiScale(
            np.ascontiguousarray(picture), 1.1, 5, minSize=(least, least), maxSize=(most, most)
        )
        if len(faces) == 0:
            return None
        x, y, side, _ = max(faces.tolist(), key=lambda face: face[2])
        return x, y, side


def _gray(pixels: Tensor) -> Tensor:
    """(T, 3, H, W) RGB to (T, H, W), with the weights of ITU-R BT.601."""
    red, green, blue = pixels.float().unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8)


def _cut(picture: NDArray[np.uint8], square: NDArray[np.float64]) -> Tensor:
    """A square of a picture, its edge repeated where the square leaves it, at 96 x 96."""
    cv2 = extras.require("cv2")
    side = max(2, round(float(square[2])))
    left, top = (round(float(center) - side / 2) for center in square[:2])
    rows = np.clip(np.arange(top, top + side), 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(left, left + side), 0, picture.shape[1] - 1)
    way = cv2.INTER_AREA if side > CROP else cv2.INTER_CUBIC
    crop: NDArray[np.uint8] = cv2.resize(picture[np.ix_(rows, columns)], (CROP, CROP), interpolation=way)
    return torch.from_numpy(crop)
