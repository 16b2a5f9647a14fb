"""Dropped tokens that cost nothing: the decoder runs over the tokens that stay.

Source: KARL (arXiv 2507.07995) masks halted tokens and always computes all positions. A masked token changes nothing
that stays, so taking it out gives the same images, provided that the others keep the position they had; that is what
this file does, and what the paper's savings are about.

Images are sorted by their count and cut into groups of nearly equal count, so that padding is computed for few tokens
only; an image's result does not depend on its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "groups", "pack"]


class Packed(NamedTuple):
    """Kept tokens of every image, moved to the left."""

    values: Tensor
    """`(B, N, D)`, N the largest count; zero in padding."""
    positions: Tensor
    """`(B, N)` int64, where each stood; -1 in padding."""
    mask: Tensor
    """`(B, N)` bool."""


def pack(values: Tensor, keep: Tensor) -> Packed:
    """Moves the kept tokens of every image to the left, in order, and cuts what nobody needs.

    Args:
        values: `(B, T, D)`; what is not kept is not read, and may be NaN.
        keep: `(B, T)` bool.
    """
    counts = keep.sum(1)
    width = int(counts.max()) if len(counts) else 0
    positions = (~keep).long().argsort(dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=keep.device) < counts[:, None]
    found = values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))
    return Packed(torch.where(mask[..., None], found, 0), positions.masked_fill(~mask, -1), mask)


def groups(counts: Sequence[int], fixed: int, waste: float = 0.02) -> list[list[int]]:
    """Rows that are worth computing together.

    Args:
        counts: kept tokens of every image.
        fixed: positions that every image has besides.
        waste: largest share of padding in a group.

    Returns:
        Lists of row numbers, each row in one of them, of similar counts.
    """
    out: list[list[int]] = []
    padded = real = 0
    for row in sorted(range(len(counts)), key=lambda i: -counts[i]):
        length = fixed + counts[row]
        longest = fixed + counts[out[-1][0]] if out else 0
        if out and (padded + longest) - (real + length) <= waste * (padded + longest):
            out[-1].append(row)
            padded, real = padded + longest, real + length
        else:
            out.append([row])
            padded = real = length
    return out
