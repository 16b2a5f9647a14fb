"""Frames, rows and columns of visual tokens, by what the encoder of a vision-language model was given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["Grid", "encoded_grids", "grids_of_rows"]

Grid: TypeAlias = tuple[int, int, int]


def encoded_grids(config: Any, modality: str, given: Mapping[str, Any], lengths: Sequence[int]) -> list[Grid]:
    """The grid of every item of a call of `get_image_features` or `get_video_features`.

    A LLaVA-OneVision picture is no grid: it is an overview, then tiles whose rows end with newlines. It is taken for a
    column of frames of one token.

    Args:
        config: Of the model.
        modality: "image" or "video".
        given: The arguments of the call by name.
        lengths: Tokens of every item; there may be more than the grid has cells.
    """
    patches, pixels = given.get(f"{modality}_grid_thw"), given.get("pixel_values_videos")
    if patches is not None:
        merge = config.vision_config.spatial_merge_size
        return [(t, h // merge, w // merge) for t, h, w in patches.tolist()]
    grids = []
    for n in lengths:
        frames = pixels.shape[1] if pixels is not None else n
        side = math.isqrt(n // frames)
        grids.append((frames, side, side))
    return grids


def grids_of_rows(grids: Sequence[Grid], rows: Sequence[int], lengths: Sequence[int]) -> list[Grid]:
    """The grid of every item when rows may have been copied for beams or several answers since they were encoded.

    Args:
        grids: Of the items as encoded.
        rows: The row of every item, ascending; row r is a copy of row r - r % k where there are k times as many items.
        lengths: Tokens of every item. An item that its grid does not fit, or that has none, is one token a frame.
    """
    plain: list[Grid] = [(n, 1, 1) for n in lengths]
    if not grids or len(rows) % len(grids):
        return plain
    copies = len(rows) // len(grids)
    encoded = [row for row in rows if row % copies == 0]
    if len(encoded) != len(grids):
        return plain
    of_row: dict[int, list[Grid]] = {}
    for row, grid in zip(encoded, grids, strict=True):
        of_row.setdefault(row, []).append(grid)
    taken = dict.fromkeys(rows, 0)
    for i, row in enumerate(rows):
        known = of_row.get(row - row % copies, [])
        if taken[row] < len(known) and math.prod(known[taken[row]]) <= lengths[i]:
            plain[i] = known[taken[row]]
        taken[row] += 1
    return plain
