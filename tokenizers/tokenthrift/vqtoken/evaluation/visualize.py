"""The codes of VQToken drawn over their clip: a row of frames, and below it the region of every token in color.

The regions of one token have one color in all frames, so a shape that moves keeps its color and a scene that changes
changes colors. Hues go around the circle in order of time and differ in brightness. Borders of regions are white.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from tokenthrift.extras import require

__all__ = ["draw_clip", "overlay", "region_colors"]

_HEIGHT: Final = 144
_WIDEST: Final = 1800
_GAP: Final = 6
_LINE: Final = 18
_OPACITY: Final = 0.5
_EDGE: Final = 0.45
_GOLDEN: Final = 0.381966


def region_colors(count: int) -> NDArray[np.float32]:
    """(count, 3) in [0, 255]: neighbors differ in hue by the golden angle, and in turns in brightness."""
    made = [
        colorsys.hsv_to_rgb(i * _GOLDEN % 1, (0.85, 0.6, 0.95)[i % 3], (1.0, 0.8, 0.6)[i // 2 % 3])
        for i in range(count)
    ]
    return np.asarray(made, dtype=np.float32).reshape(-1, 3) * 255


def overlay(frame: NDArray[np.uint8], regions: NDArray[np.int64], palette: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A frame under the colors of its regions, with white lines between them.

    Args:
        frame: (height, width, 3).
        regions: (rows, columns) token of every cell.
        palette: (tokens, 3) in [0, 255].
    """
    height, width = frame.shape[:2]
    rows = np.arange(height) * regions.shape[0] // height
    columns = np.arange(width) * regions.shape[1] // width
    large = regions[rows][:, columns]
    gray = frame.astype(np.float32).mean(2, keepdims=True)
    # Half of the color of the frame itself goes, so that the regions' colors stand out.
    mixed = (1 - _OPACITY) * (0.5 * frame + 0.5 * gray) + _OPACITY * palette[large]
    edge = np.zeros((height, width), dtype=bool)
    edge[1:] |= large[1:] != large[:-1]
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    mixed[edge] = (1 - _EDGE) * mixed[edge] + _EDGE * 255
    painted: NDArray[np.uint8] = mixed.round().clip(0, 255).astype(np.uint8)
    return painted


def draw_clip(
    path: Path,
    title: str,
    frames: Tensor,
    seconds: Tensor,
    maps: Mapping[str, Tensor],
    *,
    aspect: float = 1.0,
    columns: int = 8,
) -> None:
    """Writes a PNG: a row of frames with their times, then one row of regions for every map.

    Args:
        path: of the picture.
        title: first line.
        frames: (T, 3, height, width) uint8; where there are more than `columns`, some of them evenly spread.
        seconds: (T,) when they are shown.
        maps: caption to (T, rows, columns) token of every cell.
        aspect: width of a frame as drawn, by its height; encoders take most clips squeezed.
        columns: most frames; a wide clip has fewer.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    image, drawing = require("PIL.Image"), require("PIL.ImageDraw")
    width = round(_HEIGHT * min(max(aspect, 0.4), 2.5))
    count = min(columns, len(frames), _WIDEST // (width + _GAP))
    shown = [i * (len(frames) - 1) // max(count - 1, 1) for i in range(count)]
    small = interpolate(frames[shown].float(), (_HEIGHT, width), mode="bicubic", antialias=True)
    pixels = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    band = _HEIGHT + _LINE + _GAP
    canvas = image.new("RGB", (_GAP + count * (width + _GAP), _LINE + _GAP + band * (1 + len(maps))), (250, 250, 250))
    pen = drawing.Draw(canvas)
    pen.text((_GAP, 4), title, fill=(20, 20, 20))
    for slot, frame in enumerate(shown):
        left, top = _GAP + slot * (width + _GAP), _LINE + _GAP
        pen.text((left, top), f"{seconds[frame]:.1f} s", fill=(90, 90, 90))
        canvas.paste(image.fromarray(pixels[slot]), (left, top + _LINE))
    for row, (caption, index_map) in enumerate(maps.items(), 1):
        palette, top = region_colors(int(index_map.max()) + 1), _LINE + _GAP + row * band
        pen.text((_GAP, top), caption, fill=(90, 90, 90))
        for slot, frame in enumerate(shown):
            left = _GAP + slot * (width + _GAP)
            painted = overlay(pixels[slot], index_map[frame].numpy(), palette)
            canvas.paste(image.fromarray(painted), (left, top + _LINE))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.part")
    canvas.save(whole, format="PNG", optimize=True)
    whole.replace(path)
