"""Codes for what is rare: an object in few tokens gets one, and everything that clustering promises still holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tokenizers.vqtoken.clips import mixture, noise
from tokenthrift.config import ConfigError
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken, VQTokenConfig
from tokenthrift.vqtoken.adaptive import with_outliers
from tokenthrift.vqtoken.clustering import find, unit_tokens

PLAIN, RARE = VQToken(), VQToken(VQTokenConfig(outlier_share=0.5))


def scene(rare: int = 3) -> torch.Tensor:
    """(1, 256, 32): eight loose groups of tokens, and `rare` tokens of one direction that none of them has."""
    tokens, _ = mixture(8, 256, width=32, spread=0.8)
    tokens[100 : 100 + rare] = 3 * noise(5, 1, 32)
    return tokens[None]


def test_what_is_rare_has_a_code_of_its_own() -> None:
    tokens = TokenBatch.from_embeddings(scene(), grids=[(4, 8, 8)])
    for model, alone in ((PLAIN, False), (RARE, True)):
        index_map = model.compress(tokens, 8).maps[0].flatten()
        members = (index_map == index_map[100]).nonzero().flatten().tolist()
        assert (members == [100, 101, 102]) == alone


@pytest.mark.parametrize(("share", "ordinary"), [(0.25, 6), (0.5, 4), (1.0, 1)])
def test_each_outlier_is_the_token_least_like_all_centers_before_it(share: float, ordinary: int) -> None:
    unit, mask = unit_tokens(scene(), None)
    start = find(unit, mask, torch.tensor([ordinary]))
    centers = torch.nn.functional.normalize(start.sums[0], dim=1)
    for _ in range(8 - ordinary):
        nearest = (unit[0].double() @ centers.T).amax(1)
        centers = torch.cat([centers, unit[0, nearest.argmin()].double()[None]])
    first = (unit[0].double() @ centers.T).argmax(1)
    moved = torch.stack([unit[0][first == k].double().sum(0) for k in range(8)])
    expected = (unit[0].double() @ torch.nn.functional.normalize(moved, dim=1).T).argmax(1)
    found = with_outliers(unit, mask, start, torch.tensor([8]))
    assert torch.equal(found.labels[0], expected)
    model = VQToken(VQTokenConfig(outlier_share=share))
    index_map = model.compress(TokenBatch.from_embeddings(scene(), grids=[(4, 8, 8)]), 8).maps[0].flatten()
    assert len({(int(a), int(b)) for a, b in zip(index_map, expected, strict=True)}) == 8  # one partition


def test_counts_are_exact_and_no_clip_depends_on_its_neighbors() -> None:
    clips = [scene()[0], noise(1, 40, 32), torch.ones(12, 32)]
    together = RARE.reduce(TokenBatch.from_items(clips), [8, 5, 7])
    assert together.mask.sum(1).tolist() == [8, 5, 7]
    for row, (clip, budget) in enumerate(zip(clips, (8, 5, 7), strict=True)):
        alone = RARE.reduce(TokenBatch.from_items([clip]), budget)
        assert torch.equal(alone.embeddings[0], together.embeddings[row, :budget])
        assert torch.equal(alone.positions[0], together.positions[row, :budget])


def test_a_share_of_zero_is_plain_clustering_and_a_single_code_the_mean() -> None:
    tokens = TokenBatch.from_embeddings(scene(), grids=[(4, 8, 8)])
    zero = VQToken(VQTokenConfig(outlier_share=0.0)).reduce(tokens, 8)
    assert torch.equal(zero.embeddings, PLAIN.reduce(tokens, 8).embeddings)
    assert torch.equal(RARE.reduce(tokens, 1).embeddings, PLAIN.reduce(tokens, 1).embeddings)


def test_the_published_code_has_none() -> None:
    with pytest.raises(ConfigError, match="outlier_share"):
        VQTokenConfig(compat="released", outlier_share=0.5)
    with pytest.raises(ConfigError, match="outlier_share"):
        VQTokenConfig(outlier_share=1.5)


class Waits(TorchDispatchMode):
    """Counts operations whose results a GPU has to hand over before the program goes on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


def test_no_outlier_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenthrift.vqtoken.adaptive.PASSES", 1)
    unit, mask = unit_tokens(scene(), None)
    start = find(unit, mask, torch.tensor([4]))
    waits = []
    for slots in (5, 40):
        with Waits() as found:
            with_outliers(unit, mask, start, torch.tensor([slots]))
        waits.append(found.count)
    assert waits[0] == waits[1]
