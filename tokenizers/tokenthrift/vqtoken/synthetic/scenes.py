"""Scenes as frames: colored shapes and letters drawn over real clips or over a texture.

Made for this project. A background is a clip of frames, of which a scene shows a window in space and time, mirrored or
not. Clips are divided between training, development and test by file, never by frame (see recipes/vqtoken).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenthrift.vqtoken.synthetic.questions import COLORS, SHAPES, Scene

__all__ = ["Pixels", "draw", "patch_labels", "read_backgrounds", "texture", "window"]

Pixels = NDArray[np.uint8]
_PAINT: Final = np.array(
    [(225, 35, 35), (40, 190, 60), (45, 80, 235), (240, 215, 40), (225, 60, 220), (245, 245, 245)], np.float32
)
_FINE = 4  # sub-pixels along a side, for smooth edges


def read_backgrounds(folder: str | Path) -> list[Pixels]:
    """Clips of a folder, as `recipes/vqtoken/backgrounds.py` writes them.

    Returns:
        One (frames, height, width, 3) uint8 array a file, read from disk when looked at.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file holds something else.
    """
    clips = [np.load(path, mmap_mode="r") for path in sorted(Path(folder).glob("*.npy"))]
    if not clips:
        raise FileNotFoundError(f"no backgrounds (*.npy) in {folder}; make them with recipes/vqtoken/backgrounds.py")
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
            raise ValueError(
                f"{clip.filename}: expected uint8 (frames, height, width, 3), not {clip.dtype} {clip.shape}"
            )
    return clips


def texture(rng: random.Random, num_frames: int, image_size: int) -> Pixels:
    """(num_frames, image_size, image_size, 3) of drifting colored waves: a background that needs no file."""
    waves = np.random.default_rng(rng.getrandbits(63))
    y, x, time = np.meshgrid(np.arange(image_size), np.arange(image_size), np.arange(num_frames), indexing="ij")
    out = np.full((image_size, image_size, num_frames, 3), waves.uniform(60, 180, 3))
    for _ in range(4):
        fx, fy, ft, phase = waves.uniform(-0.25, 0.25, 4) * (1, 1, 2, 25)
        out += np.sin(fx * x + fy * y + ft * time + phase)[..., None] * waves.uniform(-30, 30, 3)
    waved: Pixels = np.clip(out.transpose(2, 0, 1, 3), 0, 255).astype(np.uint8)
    return waved


def window(clips: Sequence[Pixels], rng: random.Random, num_frames: int, image_size: int) -> Pixels:
    """(num_frames, image_size, image_size, 3) from a random clip, at random mirrored and dimmed or brightened.

    Raises:
        ValueError: a clip is shorter than `num_frames` or smaller than `image_size`.
    """
    clip = rng.choice(clips)
    length, height, width = clip.shape[:3]
    if length < num_frames or min(height, width) < image_size:
        raise ValueError(
            f"a background of {clip.shape[:3]} is too small for {num_frames} frames of {image_size} pixels"
        )
    stride = rng.randint(1, min(3, (length - 1) // max(num_frames - 1, 1)))
    first = rng.randrange(length - stride * (num_frames - 1))
    y, x = rng.randrange(height - image_size + 1), rng.randrange(width - image_size + 1)
    part = clip[first : first + stride * (num_frames - 1) + 1 : stride, y : y + image_size, x : x + image_size]
    if rng.random() < 0.5:
        part = part[:, :, ::-1]
    light = rng.uniform(0.6, 1.15)
    lit: Pixels = np.clip(part * light, 0, 255).astype(np.uint8)
    return lit


def draw(scene: Scene, background: Pixels) -> Pixels:
    """The clip of a scene: (num_frames, image_size, image_size, 3) uint8; later shapes lie over earlier ones.

    Args:
        scene: what happens.
        background: (num_frames, image_size, image_size, 3); it is not changed.
    """
    clip = background.copy()
    for shape in scene.shapes:
        cover = _mask(shape.name, shape.size)[..., None]
        paint = cover * _PAINT[COLORS.index(shape.color)]
        for frame in range(shape.enter, shape.leave):
            rows, columns = _box(shape.at(frame), shape.size)
            spot = clip[frame, rows, columns]
            clip[frame, rows, columns] = (paint + (1 - cover) * spot).astype(np.uint8)
    return clip


def patch_labels(scene: Scene, patch_size: int) -> NDArray[np.int64]:
    """What each patch shows: (num_frames, h, w, 3) with the numbers of color, name and shape, 0 for none.

    A patch shows the topmost shape that covers at least a fifteenth of it.
    """
    grid = scene.image_size // patch_size
    labels = np.zeros((scene.num_frames, grid, grid, 3), np.int64)
    for index, shape in enumerate(scene.shapes, 1):
        number = (1 + COLORS.index(shape.color), 1 + SHAPES.index(shape.name), index)
        for frame in range(shape.enter, shape.leave):
            rows, columns = _box(shape.at(frame), shape.size)
            plane = np.zeros((scene.image_size, scene.image_size), np.float32)
            plane[rows, columns] = _mask(shape.name, shape.size)
            share = plane.reshape(grid, patch_size, grid, patch_size).mean((1, 3))
            labels[frame, share > 1 / 15] = number
    return labels


def _box(at: tuple[float, float] | None, size: int) -> tuple[slice, slice]:
    assert at is not None
    left, top = round(at[0] - size / 2), round(at[1] - size / 2)
    return slice(top, top + size), slice(left, left + size)


@cache
def _mask(name: str, size: int) -> NDArray[np.float32]:
    """(size, size) share of every pixel that a shape of this name covers."""
    steps = (np.arange(size * _FINE) + 0.5) / (size * _FINE) * 2 - 1
    x, y = steps[None, :], steps[:, None]
    radius, bar = np.hypot(x, y), 0.3
    inside = {
        "circle": radius < 0.95,
        "square": np.maximum(abs(x), abs(y)) < 0.85,
        "triangle": (y < 0.85) & (abs(x) < (y + 0.95) / 1.9),
        "ring": (radius < 0.97) & (radius > 0.55),
        "cross": np.minimum(abs(x), abs(y)) < bar,
        "T": ((y < -0.4) | (abs(x) < bar)) & (abs(x) < 0.9) & (abs(y) < 0.95),
        "H": ((abs(x) > 0.4) | (abs(y) < bar)) & (abs(x) < 0.9) & (abs(y) < 0.95),
        "L": ((x < -0.3) | (y > 0.4)) & (abs(x) < 0.9) & (abs(y) < 0.95),
    }[name]
    fine = np.broadcast_to(inside, (size * _FINE, size * _FINE))
    cover: NDArray[np.float32] = fine.reshape(size, _FINE, size, _FINE).mean((1, 3), dtype=np.float32)
    return cover
