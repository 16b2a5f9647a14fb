"""Rows of unequal length in one tensor: masks, padding, packing and gathering, written once for all systems.

A mask is (B, N) bool, True where a position is real. Padding holds anything and is never read: published code often
multiplies by a mask, which lets NaN in padding through; here real positions are taken out by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["gather_rows", "length_mask", "pack", "pad_rows", "unpad_rows"]


def length_mask(lengths: Tensor | Sequence[int], width: int | None = None) -> Tensor:
    """(B, N) bool, True at the first `lengths[b]` positions of row b.

    Args:
        lengths: (B,) counts.
        width: N; the longest row if not given.
    """
    lengths = torch.as_tensor(lengths)
    if width is None:
        width = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def pad_rows(
    rows: Sequence[Tensor], side: Literal["left", "right"] = "right", value: float = 0
) -> tuple[Tensor, Tensor]:
    """Rows (N_b, ...) of unequal length as one (B, N, ...) tensor, and its (B, N) mask.

    Args:
        rows: at least one, alike but for the first axis.
        side: where the padding goes.
        value: what it holds.
    """
    padded = pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
    mask = length_mask(torch.tensor([len(row) for row in rows], device=padded.device), padded.shape[1])
    return padded, mask if side == "right" else mask.flip(1)


def unpad_rows(padded: Tensor, mask: Tensor) -> list[Tensor]:
    """The real positions of every row: B tensors (N_b, ...)."""
    return [row[real] for row, real in zip(padded, mask, strict=True)]


def gather_rows(states: Tensor, index: Tensor) -> Tensor:
    """(B, n, ...): position `index[b, i]` of row b of (B, N, ...), for an int64 (B, n) index."""
    shape = (*index.shape, *states.shape[2:])
    return states.gather(1, index.reshape(*index.shape, *([1] * (states.ndim - 2))).expand(shape))


def pack(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the real positions of each row to its front, in their order, and cuts what no row needs.

    Args:
        states: (B, N, ...).
        mask: (B, N) bool.

    Returns:
        States (B, N', ...) and mask (B, N') with N' the longest row; what padding holds is unspecified.
    """
    width = int(mask.sum(1).max()) if mask.numel() else 0
    order = (~mask).int().argsort(dim=1, stable=True)[:, :width]
    return gather_rows(states, order), mask.gather(1, order)
