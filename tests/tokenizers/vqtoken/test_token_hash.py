"""The token hash: what it says of a cluster, and that it does not depend on numbers, sizes or neighbors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.vqtoken.token_hash import (
    FEATURES,
    OCTAVES,
    SIDE,
    TIMES,
    Grid,
    central_cells,
    describe,
    increasing,
    layout_of,
    ranks,
)

CENTRE = slice(2, 5)
LIFE = slice(5 + 6 * OCTAVES + 3, 5 + 6 * OCTAVES + 6)
MOTION = slice(LIFE.stop, LIFE.stop + 4)
WHEN = slice(MOTION.stop, MOTION.stop + TIMES)
WHERE = slice(FEATURES - SIDE * SIDE, FEATURES)


def described(index_map: Tensor, slots: int) -> Tensor:
    labels = index_map.flatten()[None]
    t, h, w = index_map.shape
    return describe(labels, layout_of(labels >= 0, [(t, h, w)]), slots)[0]


def test_a_thing_that_moves_right_and_down_drifts_and_the_background_stays() -> None:
    index_map = torch.zeros(8, 8, 8, dtype=torch.long)
    for t in range(8):
        index_map[t, t // 2, t] = 1
    background, thing = described(index_map, 2)
    down, right, with_rows, with_columns = thing[MOTION].tolist()
    assert 0.8 < right < 1.0
    assert 0.3 < down < 0.6
    assert with_columns > 0.999
    assert with_rows > 0.9
    assert background[MOTION].abs().max() < 0.05
    torch.testing.assert_close(thing[0], torch.tensor(1 / 64))
    torch.testing.assert_close(thing[WHEN], torch.full((8,), 1 / 8))


def test_when_and_where_a_cluster_lives() -> None:
    index_map = torch.zeros(10, 4, 4, dtype=torch.long)
    index_map[5:8, 0, 3] = 1
    thing = described(index_map, 3)[1]
    torch.testing.assert_close(thing[CENTRE], torch.tensor([0.65, 0.125, 0.875]))
    torch.testing.assert_close(thing[LIFE], torch.tensor([0.5, 0.8, 0.3]))
    assert thing[WHERE].nonzero().flatten().tolist() == [3]
    assert not described(index_map, 3)[2].any()


@settings(deadline=None, max_examples=20)
@given(
    sides=st.tuples(st.integers(1, 20), st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 99),
    slots=st.integers(1, 9),
)
def test_new_numbers_only_reorder_and_neighbors_do_not_matter(sides: Grid, seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index_map = torch.randint(0, slots, sides, generator=generator)
    features = described(index_map, slots)
    assert features.shape == (slots, FEATURES)
    assert features.isfinite().all()
    renumbered = torch.randperm(slots, generator=generator)
    assert torch.equal(described(renumbered[index_map], slots)[renumbered], features)
    other: Grid = (3, 2, 9)
    flat = index_map.flatten()
    labels = torch.full((2, max(len(flat), 54) + 3), -1)
    labels[0, : len(flat)], labels[1, 3:57] = flat, torch.randint(0, slots, (54,), generator=generator)
    together = describe(labels, layout_of(labels >= 0, [sides, other]), slots)
    assert torch.equal(together[0], features)


def test_one_frame_does_not_move() -> None:
    features = described(torch.arange(4).view(1, 2, 2), 4)
    assert not features[:, MOTION].any()
    assert torch.equal(features[:, LIFE], torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3))


def test_a_cluster_of_one_frame_does_not_move_by_rounding_either() -> None:
    index_map = torch.zeros(4, 2, 5, dtype=torch.long)
    index_map[3, 0, 1:] = 1  # 5 cells, of which 1 are a row lower: the mean row is no binary number
    index_map[3, 1, :1] = 1
    assert not described(index_map, 2)[1, MOTION].any()


def test_positions_rise_and_stay_as_near_as_they_can() -> None:
    labels = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 3]])
    cells = central_cells(labels, layout_of(labels >= 0, None), 4)
    assert cells.tolist() == [[2, 2, 5, 7]]
    assert increasing(cells, torch.tensor([8]), torch.tensor([4])).tolist() == [[2, 3, 5, 7]]
    crowded = torch.tensor([[7, 7, 7, 7]])
    assert increasing(crowded, torch.tensor([8]), torch.tensor([4])).tolist() == [[4, 5, 6, 7]]
    assert ranks([torch.tensor([[1, 0, 1]]), torch.tensor([[5, 9, 3]])]).tolist() == [[2, 0, 1]]


def described_in_words(index_map: Tensor, k: int) -> list[float]:
    """The features of one cluster by their definition, cell by cell."""
    sides = index_map.shape
    cells: list[list[int]] = (index_map == k).nonzero().tolist()
    size, total = len(cells), index_map.numel()
    mean = [sum(cell[axis] for cell in cells) / size for axis in range(3)]
    center = [(mean[axis] + 0.5) / sides[axis] for axis in range(3)]

    def covariance(a: int, b: int) -> float:
        return sum((cell[a] - mean[a]) * (cell[b] - mean[b]) for cell in cells) / size

    angles = [[math.pi * 2.0**octave * c for octave in range(OCTAVES)] for c in center]
    out = [size / total, math.log(size) / math.log(total), *center]
    out += [math.sin(a) for row in angles for a in row] + [math.cos(a) for row in angles for a in row]
    out += [math.sqrt(covariance(axis, axis)) / sides[axis] for axis in range(3)]
    times = sorted({cell[0] for cell in cells})
    out += [times[0] / sides[0], (times[-1] + 1) / sides[0], len(times) / sides[0]]
    drift, correlation = [0.0, 0.0], [0.0, 0.0]
    for axis in (1, 2):
        with_time, spread = covariance(0, axis), covariance(0, 0)
        if spread > 1e-9:
            drift[axis - 1] = with_time / spread * (times[-1] - times[0]) / sides[axis]
            spreads = math.sqrt(spread * covariance(axis, axis))
            correlation[axis - 1] = with_time / spreads if spreads > 1e-9 else 0.0
    out += [min(max(value, -2), 2) for value in drift + correlation]
    eighths = [[cell for cell in cells if cell[0] * TIMES // sides[0] == i] for i in range(TIMES)]
    out += [len(part) / size for part in eighths]
    for axis in (1, 2):
        means = [sum(cell[axis] for cell in part) / len(part) if part else None for part in eighths]
        out += [0.0 if m is None else (m + 0.5) / sides[axis] - center[axis] for m in means]
    parts = [(cell[1] * SIDE // sides[1]) * SIDE + cell[2] * SIDE // sides[2] for cell in cells]
    return out + [parts.count(part) / size for part in range(SIDE * SIDE)]


@pytest.mark.parametrize("sides", [(11, 5, 6), (3, 4, 4), (8, 2, 9)])
def test_every_feature_is_what_its_definition_says(sides: Grid) -> None:
    index_map = torch.randint(0, 5, sides, generator=torch.Generator().manual_seed(0))
    index_map[0] = index_map[0].clamp(max=3)
    index_map[index_map == 4] = 0
    index_map[-1, 1, 1:] = 4  # a cluster of a single frame
    index_map[:, 0, 0] = 5  # and one of a single cell of all frames
    features = described(index_map, 7)
    for k in range(6):
        torch.testing.assert_close(features[k], torch.tensor(described_in_words(index_map, k)), rtol=1e-5, atol=1e-5)
    assert not features[4, MOTION].any(), "exactly zero"
    assert not features[6].any(), "an empty cluster"
