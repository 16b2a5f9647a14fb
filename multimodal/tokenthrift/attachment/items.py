"""Where the items of a prompt stand: rows, columns and grids of the placeholders of every picture, clip and recording.

The encoder says how many tokens each item has and of what shape it was; a row of ids says where placeholders are. For
beams and several answers the rows of ids are copied after the items were encoded, which is told from the counts.

A grid is frames, rows and columns of tokens. A picture of several tiles with newlines (LLaVA-NeXT, LLaVA-OneVision) and
a recording are no grid: they are taken for a column of frames of one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tokenthrift.attachment.encoder import Kept

__all__ = [
    "Encoded",
    "Grid",
    "Item",
    "clips",
    "each",
    "encoded_grids",
    "encoded_items",
    "pictures_of_tiles",
    "recordings",
    "runs",
]

Grid: TypeAlias = tuple[int, int, int]
_GAP = 4
"""Most tokens between two tiles of a picture: the end of one, new lines, the mark of the next."""


class Item(NamedTuple):
    """An item in the input: modality, row, columns of its placeholders, grid, and its number among those encoded."""

    modality: str
    row: int
    columns: Tensor
    grid: Grid
    number: int = -1


class Encoded(NamedTuple):
    """What an encoder was given: tokens and grid of every item; `within` the call that reads them, or before it."""

    lengths: list[int]
    grids: list[Grid]
    within: bool
    kept: Sequence[Kept] = ()
    """Where the encoder was reduced and its units are tokens of the items: what is left of each."""


def each(model: Any, given: Mapping[str, Any], output: Any) -> list[int]:
    """The encoder gives one tensor of features (N, D) an item."""
    return [len(features) for features in getattr(output, "pooler_output", output)]


def clips(model: Any, given: Mapping[str, Any], output: Any) -> list[int]:
    """The encoder gives one tensor a frame, and clips have as many frames as their pixels."""
    lengths, pixels = each(model, given, output), given.get("pixel_values_videos")
    frames = len(lengths) if pixels is None else pixels.shape[1]
    return [sum(lengths[i : i + frames]) for i in range(0, len(lengths), frames)]


def recordings(model: Any, given: Mapping[str, Any], output: Any) -> list[int]:
    """The encoder joins recordings; their lengths follow from the mask of the spectrogram."""
    mask = given.get("feature_attention_mask")
    lengths = given["audio_feature_lengths"] if mask is None else mask.sum(-1)
    counts: list[int] = model.audio_tower._get_feat_extract_output_lengths(lengths)[1].tolist()
    return counts


def encoded_grids(modality: str, given: Mapping[str, Any], lengths: Sequence[int]) -> list[Grid]:
    """The grid of every item of a call of an encoding method.

    Args:
        modality: "image", "video" or another.
        given: The arguments of the call by name.
        lengths: Tokens of every item; there may be more than the grid has cells.
    """
    patches = given.get(f"{modality}_grid_thw")
    if patches is not None:
        grids = []
        for (frames, height, width), n in zip(patches.tolist(), lengths, strict=True):
            merged = math.isqrt(frames * height * width // n)
            grids.append((frames, height // merged, width // merged))
        return grids
    pixels = given.get(f"pixel_values{'_videos' if modality == 'video' else ''}")
    if pixels is None or (modality == "image" and pixels.ndim != 4):
        return [(n, 1, 1) for n in lengths]
    frames = pixels.shape[1] if modality == "video" else 1
    sides = [math.isqrt(n // frames) for n in lengths]
    if modality == "image":
        return [(1, side, side) if side * side == n else (n, 1, 1) for side, n in zip(sides, lengths, strict=True)]
    return [(frames, side, side) for side in sides]


def runs(modality: str, placeholders: Tensor) -> list[Item]:
    """Every unbroken run of placeholders as an item.

    Args:
        modality: What they stand for.
        placeholders: (B, L) bool.
    """
    items = []
    for row, marked in enumerate(placeholders):
        columns = marked.nonzero().flatten()
        breaks = (columns.diff() != 1).nonzero().flatten() + 1
        for run in columns.tensor_split(breaks.cpu()):
            if n := len(run):
                side = math.isqrt(n)
                square = modality == "image" and side * side == n
                items.append(Item(modality, row, run, (1, side, side) if square else (n, 1, 1)))
    return items


def pictures_of_tiles(modality: str, placeholders: Tensor, ids: Tensor) -> list[Item]:
    """Every picture as an item, where its tiles stand apart and its whole view comes last.

    The processors of Idefics 3 and SmolVLM write a mark before each tile, which says row and column, and another before
    the whole view. A prompt ends with a whole view, so the mark of the last run is that of the ends of pictures.

    Args:
        modality: what the placeholders stand for.
        placeholders: (B, L) bool.
        ids: (B, L) of the prompt.
    """
    tiles = runs(modality, placeholders)
    marks = [int(ids[tile.row, tile.columns[0] - 1]) if tile.columns[0] else -1 for tile in tiles]
    items: list[Item] = []
    waiting: list[Item] = []
    for tile, mark in zip(tiles, marks, strict=True):
        last = waiting[-1] if waiting else tile
        gap = int(tile.columns[0] - last.columns[-1]) - 1 if waiting else 0
        if tile.row != last.row or gap > _GAP or len(tile.columns) != len(last.columns):
            items, waiting = items + waiting, []  # not tiles of one picture
        waiting.append(tile)
        if mark == marks[-1]:
            columns = torch.cat([own.columns for own in waiting])
            items.append(tile if len(waiting) == 1 else Item(modality, tile.row, columns, (len(columns), 1, 1)))
            waiting = []
    return items + waiting


def encoded_items(modality: str, placeholders: Tensor, encoded: Encoded) -> list[Item]:
    """Every item that was encoded, at its placeholders.

    Args:
        modality: What they stand for.
        placeholders: (B, L) bool.
        encoded: Tokens and grids of the items in reading order; where they were encoded before the call, each row of
            then may be several now, one after another.

    Raises:
        ValueError: The placeholders are not those of the items.
    """
    counts, lengths = placeholders.sum(1).tolist(), encoded.lengths
    total, copies = sum(counts), 1
    if encoded.within:
        # In transformers 5.17 and earlier LLaVA-OneVision gives every clip its newline only after encoding.
        later = (total - sum(lengths)) // max(len(lengths), 1)
        lengths = [n + later for n in lengths]
    elif sum(lengths):
        copies = max(total // sum(lengths), 1)
    if total != copies * sum(lengths) or len(counts) % copies:
        raise ValueError(f"{total} placeholders for {sum(lengths)} {modality} tokens in {len(counts)} rows")
    items: list[Item] = []
    rest = list(zip(range(len(lengths)), lengths, encoded.grids, strict=True))
    for row in range(0, len(counts), copies):
        of_row: list[tuple[int, int, Grid]] = []
        while rest and sum(n for _, n, _ in of_row) < counts[row]:
            of_row.append(rest.pop(0))
        for copy in range(row, row + copies):
            if sum(n for _, n, _ in of_row) != counts[copy]:
                raise ValueError(f"the placeholders of one {modality} lie in more than one row of input_ids")
            columns = placeholders[copy].nonzero().flatten().split([n for _, n, _ in of_row])
            for part, (number, n, grid) in zip(columns, of_row, strict=True):
                if n:
                    items.append(Item(modality, copy, part, grid if math.prod(grid) <= n else (n, 1, 1), number))
    return items
