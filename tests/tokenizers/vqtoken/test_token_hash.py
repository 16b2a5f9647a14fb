"""The token hash: what it says of a cluster, and that it does not depend on numbers, sizes or neighbors."""

from __future__ import annotations

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


def test_places_rise_and_stay_as_near_as_they_can() -> None:
    labels = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 3]])
    cells = central_cells(labels, layout_of(labels >= 0, None), 4)
    assert cells.tolist() == [[2, 2, 5, 7]]
    assert increasing(cells, torch.tensor([8]), torch.tensor([4])).tolist() == [[2, 3, 5, 7]]
    crowded = torch.tensor([[7, 7, 7, 7]])
    assert increasing(crowded, torch.tensor([8]), torch.tensor([4])).tolist() == [[4, 5, 6, 7]]
    assert ranks([torch.tensor([[1, 0, 1]]), torch.tensor([[5, 9, 3]])]).tolist() == [[2, 0, 1]]
