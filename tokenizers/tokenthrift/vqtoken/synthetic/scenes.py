"""Scenes as frames: colored shapes and letters drawn over real clips, or over texture where there are none.

Made here. A background is a whole clip of frames, of which a scene shows a window: a place, a stretch of time, mirrored
or not. Clips are divided between training, development and test by file, never by frame (see recipes/vqtoken).
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
_FINE = 4  # sub-pixels of a side, for smooth edges


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


def texture(rng: random.Random, frames: int, side: int) -> Pixels:
    """(frames, side, side, 3) of drifting colored waves: a background that needs no file."""
    waves = np.random.default_rng(rng.getrandbits(63))
    y, x, time = np.meshgrid(np.arange(side), np.arange(side), np.arange(frames), indexing="ij")
    out = np.full((side, side, frames, 3), waves.uniform(60, 180, 3))
    for _ in range(4):
        fx, fy, ft, phase = waves.uniform(-0.25, 0.25, 4) * (1, 1, 2, 25)
        out += np.sin(fx * x + fy * y + ft * time + phase)[..., None] * waves.uniform(-30, 30, 3)
    waved: Pixels = np.clip(out.transpose(2, 0, 1, 3), 0, 255).astype(np.uint8)
    return waved


def window(clips: Sequence[Pixels], rng: random.Random, frames: int, side: int) -> Pixels:
    """(frames, side, side, 3) out of one of the clips, each as likely; mirrored and dimmed or lit at random.

    Raises:
        ValueError: a clip is shorter than `frames` or smaller than `side`.
    """
    clip = rng.choice(clips)
    length, height, width = clip.shape[:3]
    if length < frames or min(height, width) < side:
        raise ValueError(f"a background of {clip.shape[:3]} is too small for {frames} frames of {side} pixels")
    stride = rng.randint(1, min(3, (length - 1) // max(frames - 1, 1)))
    first = rng.randrange(length - stride * (frames - 1))
    y, x = rng.randrange(height - side + 1), rng.randrange(width - side + 1)
    part = clip[first : first + stride * (frames - 1) + 1 : stride, y : y + side, x : x + side]
    if rng.random() < 0.5:
        part = part[:, :, ::-1]
    light = rng.uniform(0.6, 1.15)
    lit: Pixels = np.clip(part * light, 0, 255).astype(np.uint8)
    return lit


def draw(scene: Scene, background: Pixels) -> Pixels:
    """The clip of a scene: (frames, side, side, 3) uint8; later things lie over earlier ones.

    Args:
        scene: what happens.
        background: (frames, side, side, 3), left as it is.
    """
    clip = background.copy()
    for thing in scene.things:
        cover = _mask(thing.shape, thing.size)[..., None]
        paint = cover * _PAINT[COLORS.index(thing.color)]
        for frame in range(thing.enter, thing.leave):
            rows, columns = _box(thing.at(frame), thing.size)
            spot = clip[frame, rows, columns]
            clip[frame, rows, columns] = (paint + (1 - cover) * spot).astype(np.uint8)
    return clip


def patch_labels(scene: Scene, patch: int) -> NDArray[np.int64]:
    """What each patch shows: (frames, side / patch, side / patch, 3), numbers of color, shape and thing, 0 for none.

    A patch shows the topmost thing that covers at least a fifteenth of it.
    """
    grid = scene.side // patch
    labels = np.zeros((scene.frames, grid, grid, 3), np.int64)
    for place, thing in enumerate(scene.things, 1):
        number = (1 + COLORS.index(thing.color), 1 + SHAPES.index(thing.shape), place)
        for frame in range(thing.enter, thing.leave):
            rows, columns = _box(thing.at(frame), thing.size)
            plane = np.zeros((scene.side, scene.side), np.float32)
            plane[rows, columns] = _mask(thing.shape, thing.size)
            share = plane.reshape(grid, patch, grid, patch).mean((1, 3))
            labels[frame, share > 1 / 15] = number
    return labels


def _box(at: tuple[float, float] | None, size: int) -> tuple[slice, slice]:
    assert at is not None
    left, top = round(at[0] - size / 2), round(at[1] - size / 2)
    return slice(top, top + size), slice(left, left + size)


@cache
def _mask(shape: str, size: int) -> NDArray[np.float32]:
    """(size, size) share of every pixel that a shape covers."""
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
    }[shape]
    fine = np.broadcast_to(inside, (size * _FINE, size * _FINE))
    cover: NDArray[np.float32] = fine.reshape(size, _FINE, size, _FINE).mean((1, 3), dtype=np.float32)
    return cover
