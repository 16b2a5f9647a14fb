"""DiffuSpec: candidates, path, draft length, and a text that is always the causal model's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.backbones.samplers.diffuspec import (
    AdaptiveLength,
    DiffuSpec,
    LengthRule,
    lattice,
    path_search,
    speculate,
)

VOCAB, EOS = 6, 5


def log_p(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_candidates_are_the_smallest_set_of_the_mass_and_the_end() -> None:
    table = log_p(
        [0.5, 0.31, 0.1, 0.04, 0.04, 0.01], [0.11, 0.11, 0.11, 0.08, 0.07, 0.52], [0.9, 0.02, 0.02, 0.02, 0.02, 0.02]
    )
    slots = lattice(table, EOS, DiffuSpec())
    assert [[token for token, _ in slot] for slot in slots] == [[0, 1, EOS], [EOS, 0, 1, 2]]
    assert slots[0][2][1] == pytest.approx(float(table[0, EOS]))
    two = lattice(table, EOS, DiffuSpec(max_candidates=2))
    assert [token for token, _ in two[0]] == [0, 1, EOS]
    # The reproduction goes on until EOS is among the candidates, and then stops.
    released = lattice(table, EOS, DiffuSpec(compat="released"))
    assert [[token for token, _ in slot] for slot in released] == [[0, 1, 2, 3, 4, EOS]]


def test_the_path_weighs_both_models_and_ends_with_the_text() -> None:
    slots = [[(0, -0.1), (1, -0.2)], [(2, -0.1), (EOS, -0.15)], [(3, -0.1)]]
    assert path_search(slots, EOS, DiffuSpec()) == [0, EOS]  # a shorter path has the smaller sum
    likes_one = {1: 0.0, 0: -5.0, 2: 0.0, EOS: -5.0, 3: 0.0}
    assert path_search(slots, EOS, DiffuSpec(), lambda so_far, token: likes_one[token]) == [1, 2, 3]
    seen: list[list[int]] = []

    def level(so_far: Sequence[int], token: int) -> float:
        del token
        seen.append(list(so_far))
        return 0.0

    path_search(slots, EOS, DiffuSpec(beam=1), level, [4, 4])
    assert seen[0] == [4, 4]
    assert all(so_far[:2] == [4, 4] for so_far in seen)


def test_the_draft_length_grows_only_while_drafts_are_accepted() -> None:
    state = AdaptiveLength().after(30, 30)
    assert (state.length, state.generated, state.accepted) == (25, 15.0, 15.0)
    state = state.after(30, 10)
    assert (state.length, state.generated, state.accepted) == (22, 22.5, 12.5)
    assert state.after(4, 4).length == 20
    assert AdaptiveLength().after(100, 100, LengthRule(longest=40)).length == 40


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), agree=st.floats(0, 1), most=st.integers(1, 30))
def test_the_text_is_the_greedy_text_of_the_causal_model(seed: int, agree: float, most: int) -> None:
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = torch.Generator().manual_seed(seed + 1)

    def following(token: int) -> int:
        return int(table[token].argmax())

    def draft(so_far: list[int], length: int) -> Tensor:
        token, rows = so_far[-1], []
        for _ in range(length):
            token = following(token)
            own = torch.randn(VOCAB, generator=noise, dtype=torch.float64)
            rows.append(agree * 10 * torch.nn.functional.one_hot(torch.tensor(token), VOCAB) + own)
        return torch.stack(rows).log_softmax(-1)

    def verify(so_far: list[int], path: list[int]) -> Tensor:
        return torch.tensor([following(token) for token in [so_far[-1], *path]])

    expected: list[int] = []
    token = 0
    while len(expected) < most and token != EOS:
        token = following(token)
        expected.append(token)
    done = speculate(draft, verify, [0], EOS, max_new_tokens=most)
    assert done.ids == expected
    assert len(done.lengths) == len(done.accepted) <= most
    assert sum(done.accepted) <= len(done.ids)
