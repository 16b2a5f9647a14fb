"""Clusters that are parts of a clip: what the likeness of two tokens is then made of, and what it changes."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tokenizers.vqtoken.clips import noise
from tokenthrift.config import ConfigError
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken, VQTokenConfig
from tokenthrift.vqtoken.clustering import unit_tokens
from tokenthrift.vqtoken.token_hash import layout_of, with_time

GRID = (8, 3, 4)


def test_likeness_is_that_of_the_tokens_and_that_of_their_times() -> None:
    unit, mask = unit_tokens(noise(0, 1, 96, 16), None)
    joined = with_time(unit, mask, layout_of(mask, [GRID]), 0.3)[0].double()
    for a, b in ((0, 0), (0, 95), (13, 59), (3, 4)):
        near = math.cos(math.pi * (a // 12 - b // 12) / 8)
        expected = 0.7 * (unit[0, a].double() @ unit[0, b].double()) + 0.3 * near
        assert (joined[a] @ joined[b] - expected).abs() < 1e-6
    assert torch.equal(joined * 2**26, (joined * 2**26).round())


def test_padding_stays_zero_and_every_clip_has_its_own_length() -> None:
    unit, mask = unit_tokens(noise(1, 2, 8, 4), torch.tensor([[True] * 8, [True] * 4 + [False] * 4]))
    joined = with_time(unit, mask, layout_of(mask, [(8, 1, 1), (4, 1, 1)]), 1.0)
    assert (joined[0, 0] @ joined[0, 4]).abs() < 1e-6  # half of the clip is a quarter turn
    assert (joined[1, 0] @ joined[1, 2]).abs() < 1e-6
    assert not joined[1, 4:].any()


def test_what_stays_alike_all_the_time_gets_a_code_for_each_part() -> None:
    clip = noise(2, 1, 16).expand(96, 16) + 0.3 * noise(3, 96, 16)
    tokens = TokenBatch.from_items([clip], grids=[GRID])
    spans = []
    for share in (0.0, 0.5):
        coded = VQToken(VQTokenConfig(time_share=share)).compress(tokens, 4)
        index_map = coded.maps[0]
        assert index_map.unique().tolist() == [0, 1, 2, 3]
        times = [(index_map == code).nonzero()[:, 0].double() for code in range(4)]
        spans.append(sum((time.amax() - time.amin()).item() for time in times) / 4)
        for code in range(4):
            mean = clip[index_map.flatten() == code].mean(0)
            torch.testing.assert_close(coded.tokens.embeddings[0, code], mean)
    assert spans[0] > 5
    assert spans[1] < 2.5


def test_order_of_events_survives() -> None:
    """Two frames shown one after the other or the other way round: positions of the codes say which."""
    first, second = (noise(seed, 1, 16).expand(48, 16) + 0.05 * noise(seed + 1, 48, 16) for seed in (4, 6))
    there = torch.cat([first, second, first])
    back = torch.cat([second, first, second])
    for share, parted in ((0.0, False), (0.5, True)):
        model = VQToken(VQTokenConfig(time_share=share))
        maps = model.compress(TokenBatch.from_items([there, back], grids=[(12, 3, 4)] * 2), 3).maps
        for index_map in maps:
            kinds = [set(index_map[start : start + 4].unique().tolist()) for start in (0, 4, 8)]
            assert kinds[0].isdisjoint(kinds[2]) == parted


def test_no_clip_depends_on_its_neighbors_and_content_still_decides() -> None:
    model = VQToken(VQTokenConfig(time_share=0.2, outlier_share=0.5))
    clips = [noise(8, 96, 16), noise(9, 24, 16), torch.ones(12, 16)]
    grids = [GRID, (2, 3, 4), (12, 1, 1)]
    together = model.reduce(TokenBatch.from_items(clips, grids=grids), [8, 5, 7])
    for row, (clip, grid, budget) in enumerate(zip(clips, grids, (8, 5, 7), strict=True)):
        alone = model.reduce(TokenBatch.from_items([clip], grids=[grid]), budget)
        assert torch.equal(alone.embeddings[0], together.embeddings[row, :budget])
        assert torch.equal(alone.positions[0], together.positions[row, :budget])
    adaptive = model.reduce(TokenBatch.from_items(clips[:1], grids=grids[:1]), "64,e0.5").usage[0]
    assert 1 < adaptive.used < 64
    assert adaptive.error is not None
    assert adaptive.error <= 0.5


def test_a_share_of_zero_is_plain_clustering_and_the_published_code_has_none() -> None:
    tokens = TokenBatch.from_items([noise(10, 96, 16)], grids=[GRID])
    zero = VQToken(VQTokenConfig(time_share=0.0)).reduce(tokens, 8)
    assert torch.equal(zero.embeddings, VQToken().reduce(tokens, 8).embeddings)
    with pytest.raises(ConfigError, match="time_share"):
        VQTokenConfig(compat="released", time_share=0.5)
    with pytest.raises(ConfigError, match="time_share"):
        VQTokenConfig(time_share=1.5)
