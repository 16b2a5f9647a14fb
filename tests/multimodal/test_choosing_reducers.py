"""What the reducers of diversity, of questions and of time keep: the structure that each was made to find."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tokenthrift.reducers import ConditionalDiversity, MaxMinDiversity, QuerySelection, TemporalMerging
from tokenthrift.reducers.diversity import greedy_determinant, max_min_indices, unit_rows
from tokenthrift.reducers.query import relevance
from tokenthrift.tokens import TokenBatch


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(tokens: TokenBatch, row: int = 0) -> list[int]:
    found: list[int] = tokens.positions[row][tokens.mask[row]].tolist()
    return found


def test_max_min_follows_its_definition() -> None:
    tokens = noise(700, 5)  # more rows than are compared at once
    unit = unit_rows(tokens)
    distance = 1 - unit @ unit.T
    chosen = [int((distance + 9 * torch.eye(700)).amin(1).argmax())]
    while len(chosen) < 12:
        nearest = distance[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    assert max_min_indices(tokens, 12).tolist() == sorted(chosen)


def test_max_min_keeps_one_of_every_kind() -> None:
    kinds = 3 * torch.eye(6)
    tokens = torch.cat([kind + 0.01 * noise(n, 6, seed=n) for kind, n in zip(kinds, (9, 1, 4, 7, 2, 1), strict=True)])
    labels = torch.tensor([0] * 9 + [1] + [2] * 4 + [3] * 7 + [4] * 2 + [5])
    reduced = MaxMinDiversity().reduce(TokenBatch.from_items([tokens]), 6)
    assert sorted(labels[kept(reduced)].tolist()) == [0, 1, 2, 3, 4, 5]


def test_the_greedy_determinant_is_the_largest_at_every_step() -> None:
    tokens, weights = noise(14, 6), torch.linspace(0.3, 1.0, 14)
    unit = unit_rows(tokens).double() * weights.double()[:, None]
    kernel = unit @ unit.T
    chosen: list[int] = []
    for _ in range(6):
        volumes = {i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in range(14) if i not in chosen}
        chosen.append(max(volumes, key=lambda i: volumes[i]))
    assert greedy_determinant(tokens, weights, 6).tolist() == chosen


def test_the_determinant_begins_anew_when_the_space_is_spanned() -> None:
    tokens = torch.cat([torch.eye(3), torch.eye(3), torch.eye(3)])
    found = greedy_determinant(tokens, torch.ones(9), 9).tolist()
    assert [sorted(i % 3 for i in found[k : k + 3]) for k in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert sorted(found) == list(range(9))


def test_conditional_diversity_keeps_what_is_asked_for_once() -> None:
    """Two near-copies of what is asked for, and tokens that have less to do with it: one copy, then others."""
    basis = torch.eye(8)
    asked = 2 * basis[0]
    others = [2 * basis[i] + 0.2 * i * basis[0] for i in range(2, 8)]
    tokens = torch.stack([asked, asked + 0.01 * basis[1], *others])
    query = basis[:1]
    found = kept(ConditionalDiversity().reduce(TokenBatch.from_items([tokens]), 1, query=[query]))
    assert found[0] in (0, 1)
    more = kept(ConditionalDiversity().reduce(TokenBatch.from_items([tokens]), 4, query=[query]))
    assert len({0, 1}.intersection(more)) == 1
    # Selection by relevance alone takes both copies.
    assert kept(QuerySelection().reduce(TokenBatch.from_items([tokens]), 2, query=[query])) == [0, 1]


@pytest.mark.parametrize("reducer", [ConditionalDiversity(), QuerySelection()])
def test_another_question_keeps_other_tokens(reducer: ConditionalDiversity | QuerySelection) -> None:
    tokens = TokenBatch.from_items([noise(40, 16), noise(40, 16), noise(30, 16, seed=5)])
    first, second = tokens.embeddings[0, 7:8], tokens.embeddings[0, 31:32]
    out = reducer.reduce(tokens, 3, query=[first, second, None])
    assert 7 in kept(out, 0)
    assert 31 in kept(out, 1)
    assert kept(out, 0) != kept(out, 1)
    assert kept(out, 2) == kept(reducer.reduce(tokens, 3), 2)  # no question is the same as none at all
    alone = reducer.reduce(tokens.select([1]), 3, query=[second])
    assert kept(alone) == kept(out, 1)


def test_only_words_about_the_tokens_rate_them() -> None:
    basis = torch.eye(12)
    tokens = torch.stack([3 * basis[i] for i in range(6)])
    filler = basis[8:11] + 0.1 * basis[1]  # words about nothing that is there, but for a little of token 1
    found = relevance(tokens, torch.cat([filler, 5 * basis[4:5]]))
    assert int(found.argmax()) == 4
    assert found[1] < found[4] / 2


@pytest.mark.parametrize("reducer", [ConditionalDiversity(), QuerySelection()])
def test_questions_that_do_not_fit_are_named(reducer: ConditionalDiversity | QuerySelection) -> None:
    tokens = TokenBatch.from_items([noise(9, 4), noise(8, 4)])
    with pytest.raises(ValueError, match="2 items but 1 questions"):
        reducer.reduce(tokens, 3, query=[noise(2, 4)])
    with pytest.raises(ValueError, match=r"question 1 is \(2, 5\)"):
        reducer.reduce(tokens, 3, query=[None, noise(2, 5)])
    with pytest.raises(ValueError, match="question 0 is NaN"):
        reducer.reduce(tokens, 3, query=[torch.full((2, 4), torch.nan), None])
    assert reducer.reduce(tokens, 3, query=[noise(0, 4), None]).usage[0].used == 3


def test_what_stands_still_is_one_token_and_what_moves_stays() -> None:
    background, thing = noise(6, 8), noise(8, seed=1)
    frames = background.expand(4, 6, 8).clone()
    for frame in range(4):
        frames[frame, frame] = thing  # moves one cell a frame, from cell 0 to cell 3
    clip = TokenBatch.from_embeddings(frames.reshape(1, 24, 8), grids=[(4, 2, 3)])
    # Cells 4 and 5 never change: three merges each. The others change when the thing comes and when it goes.
    changes = sum(
        int(not torch.equal(frames[t, c], frames[t - 1, c])) for t, c in itertools.product(range(1, 4), range(6))
    )
    out = TemporalMerging().reduce(clip, 6 + changes)
    assert out.usage[0].used == 6 + changes
    sizes = dict(zip(kept(out), out.sizes[0].tolist(), strict=True))  # type: ignore[index]
    assert sizes[4] == sizes[5] == 4
    assert sum(sizes.values()) == 24
    assert {0, 1, 2, 3, 4, 5, 7, 14, 21} <= set(sizes)  # the first frame, and the thing wherever it went
    for position, value in zip(kept(out), out.items()[0], strict=True):
        torch.testing.assert_close(value, frames.reshape(24, 8)[position])


def test_a_still_clip_is_its_first_frame_with_its_newline() -> None:
    frame, newline = noise(4, 8), noise(1, 8, seed=2)
    tokens = torch.cat([frame, frame, frame, newline])
    clip = TokenBatch.from_embeddings(tokens[None], grids=[(3, 2, 2)])
    out = TemporalMerging().reduce(clip, 5)
    torch.testing.assert_close(out.items()[0], torch.cat([frame, newline]))
    assert out.sizes is not None
    assert out.sizes[0].tolist() == [3, 3, 3, 3, 1]
    assert out.sources is not None
    assert out.sources[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    less = TemporalMerging().reduce(clip, 2)  # fewer than cells: what is left is merged by similarity
    assert less.usage[0].used == 2
    assert less.sizes is not None
    assert less.sizes[0].sum() == 13


def test_a_grid_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="item 0 has 3 tokens"):
        TemporalMerging().reduce(TokenBatch.from_embeddings(noise(1, 3, 2), grids=[(2, 1, 2)]), 2)
