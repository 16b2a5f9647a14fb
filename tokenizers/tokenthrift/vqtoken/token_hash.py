"""The token hash: where and when every code of a clip is seen, as features that do not depend on its number.

Source: VQToken (arXiv 2503.16980, section 3.3): the map of cluster numbers M over (T, H, W) is the "token hash", from
which attention is to learn motion. The published code feeds the rows of M, integers as they are, into a linear layer of
729 inputs: relabelling the same partition changes the output of a fresh model by 72 %, bf16 cannot tell numbers above
256 apart, and only one grid size fits. Here each cluster is described by moments of the cells it covers: renumbering
the clusters renumbers the descriptions and changes nothing else, and any T, H and W will do.

Sums are integers, so descriptions are the same on every device and in every batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenthrift.vqtoken.places import Layout

__all__ = ["FEATURES", "describe"]

OCTAVES = 6
TIMES = 8
SIDE = 4
FEATURES = 2 + 3 + 6 * OCTAVES + 3 + 3 + 4 + TIMES + 2 * TIMES + SIDE * SIDE


def describe(labels: Tensor, layout: Layout, slots: int) -> Tensor:
    """Place, extent, lifetime and motion of every cluster, in units of the clip.

    In this order: share of the tokens, plain and logarithmic (2); mean time, row and column (3), and sines and cosines
    of them at six octaves (36); their standard deviations (3); first and last time and the share of frames in which it
    is seen (3); drift of row and column over its lifetime and their correlation with time (4); the share of its
    tokens in each eighth of the clip (8), and how far its mean row and column are from its centre there (16); the share
    of its tokens in each cell of a 4 x 4 grid over the frame (16).

    Args:
        labels: (B, N) int64, -1 in padding.
        layout: Of the same clips.
        slots: Number of clusters; an empty one is described by zeros.

    Returns:
        (B, slots, FEATURES) float32.
    """
    batch = len(labels)
    slot = labels.where(labels >= 0, slots)
    time, row, column = cells = layout.cells.unbind(2)
    ones = torch.ones_like(time)
    products = (ones, *cells, time * time, row * row, column * column, time * row, time * column)
    sums = slot.new_zeros(batch, slots + 1, len(products))
    sums = sums.scatter_add(1, slot[..., None].expand(-1, -1, len(products)), torch.stack(products, 2))[:, :slots]
    count = sums[..., 0].double()
    some, one = count > 0, count.clamp(min=1)
    sides = layout.sides[:, None].double()
    mean = sums[..., 1:4] / one[..., None]
    centre = (mean + 0.5) / sides
    variance = (sums[..., 4:7] / one[..., None] - mean.square()).clamp(min=0)
    with_time = sums[..., 7:9] / one[..., None] - mean[..., :1] * mean[..., 1:]
    spread = variance.sqrt() / sides

    frames = int(layout.sides[:, 0].max())
    seen = _count(slot * frames + time, (slots + 1) * frames).view(batch, slots + 1, frames)[:, :slots] > 0
    duration = sides[..., 0]
    first = seen.long().argmax(2)
    last = frames - 1 - seen.flip(2).long().argmax(2)
    life = [first / duration, (last + 1) / duration, seen.sum(2) / duration]

    drift = with_time / variance[..., :1].clamp(min=1e-9) * (last - first)[..., None] / sides[..., 1:]
    correlation = with_time / (variance[..., :1] * variance[..., 1:]).sqrt().clamp(min=1e-9)
    still = variance[..., :1] < 1e-9
    drift, correlation = (motion.masked_fill(still, 0.0).clamp(-2, 2) for motion in (drift, correlation))

    eighth = slot * TIMES + time * TIMES // layout.sides[:, :1]
    when = [
        _count(eighth, (slots + 1) * TIMES, values).view(batch, slots + 1, TIMES)[:, :slots]
        for values in (ones, row, column)
    ]
    there = when[0] > 0
    path = [
        ((position / when[0].clamp(min=1) + 0.5) / sides[..., axis : axis + 1] - centre[..., axis : axis + 1]) * there
        for axis, position in ((1, when[1]), (2, when[2]))
    ]
    height, width = layout.sides[:, 1:2], layout.sides[:, 2:3]
    part = (slot * SIDE + row * SIDE // height) * SIDE + column * SIDE // width
    where = _count(part, (slots + 1) * SIDE * SIDE).view(batch, slots + 1, -1)[:, :slots]

    share = count / count.sum(1, keepdim=True).clamp(min=1)
    logarithmic = count.clamp(min=1).log() / count.sum(1, keepdim=True).clamp(min=2).log()
    waves = centre[..., None] * (math.pi * 2.0 ** torch.arange(OCTAVES, device=labels.device))
    features = torch.cat(
        [
            torch.stack([share, logarithmic], 2),
            centre,
            waves.sin().flatten(2),
            waves.cos().flatten(2),
            spread,
            torch.stack(life, 2),
            drift,
            correlation,
            when[0] / one[..., None],
            *path,
            where / one[..., None],
        ],
        2,
    )
    return features.masked_fill(~some[..., None], 0.0).float()


def _count(places: Tensor, size: int, values: Tensor | None = None) -> Tensor:
    """(B, size) int64: how often each place occurs, or the sum of values there."""
    values = torch.ones_like(places) if values is None else values
    return places.new_zeros(len(places), size).scatter_add(1, places, values)
