"""What merging reducers say of the native tokens, the way back, and tokens that take no part."""

import pytest
import torch

from tokenthrift.reducers import AveragePooling, BipartiteMerging, ItemReducer, Uniform
from tokenthrift.reducers.merging import unmerge
from tokenthrift.tokens import TokenBatch

MERGING = pytest.mark.parametrize("reducer", [AveragePooling(), BipartiteMerging(), BipartiteMerging(protected=2)])


def batch(*lengths: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    return TokenBatch.from_items([torch.randn(n, 6, generator=generator) for n in lengths])


@MERGING
def test_sources_name_the_members_of_every_average(reducer: ItemReducer) -> None:
    tokens = batch(20, 9, 3)
    once = reducer.reduce(tokens, "8")
    twice = reducer.reduce(once, "5")
    for reduced in (once, twice):
        assert reduced.sources is not None
        for i, item in enumerate(reduced.items()):
            sources = reduced.sources[i][reduced.sources[i] >= 0]
            assert len(sources) == tokens.usage[i].native
            for k, token in enumerate(item):
                members = (sources == k).nonzero().flatten()
                torch.testing.assert_close(token, tokens.items()[i][members].mean(0), rtol=0, atol=1e-5)
                assert reduced.positions[i, k] == members[0]
                assert reduced.sizes is not None
                assert reduced.sizes[i, k] == len(members)


@MERGING
def test_unmerging_puts_every_average_where_its_members_were(reducer: ItemReducer) -> None:
    tokens = batch(12)
    reduced = reducer.reduce(tokens, "5")
    assert reduced.sources is not None
    back = unmerge(reduced.embeddings[0], reduced.sources[0])
    assert back.shape == tokens.embeddings[0].shape
    assert torch.equal(back[reduced.positions[0]], reduced.embeddings[0])
    torch.testing.assert_close(back.mean(0), tokens.embeddings[0].mean(0), rtol=0, atol=1e-6)
    assert torch.equal(unmerge(back[:2], torch.tensor([1, -1])), torch.stack([back[1], torch.zeros(6)]))


@pytest.mark.parametrize("cap", [1, 2, 3, 7])
def test_protected_tokens_are_never_merged(cap: int) -> None:
    tokens = batch(10)
    tokens.embeddings[0, 2:] = tokens.embeddings[0, 0]  # every other token equals the first, and yet it stays alone
    reduced = BipartiteMerging(protected=2).reduce(tokens, cap)
    assert torch.equal(reduced.embeddings[0, : min(cap, 2)], tokens.embeddings[0, : min(cap, 2)])
    assert reduced.usage[0].used == cap
    if cap > 2:
        assert reduced.sizes is not None
        assert reduced.sizes[0, :2].tolist() == [1, 1]
    assert BipartiteMerging(protected=2).reduce(batch(1, 4), "3").usage[0].used == 1
    with pytest.raises(ValueError, match="at least 0, not -1"):
        BipartiteMerging(protected=-1)


def test_sources_follow_rows_cuts_and_concatenations() -> None:
    merged = BipartiteMerging().reduce(batch(8, 6), "4")
    assert merged.sources is not None
    assert Uniform().reduce(batch(8), "4").sources is None
    kept = Uniform().reduce(merged, "2")  # members of a dropped average are dropped
    assert kept.sources is not None
    assert sorted(set(kept.sources[0].tolist())) == [-1, 0, 1]
    assert torch.equal(merged.select([1]).sources, merged.sources[1:])  # type: ignore[arg-type]
    first = merged.first(2).sources
    assert first is not None
    assert torch.equal(first, merged.sources.where(merged.sources < 2, -1))
    joined = TokenBatch.cat([merged, BipartiteMerging().reduce(batch(12), "3")]).sources
    assert joined is not None
    assert joined.shape == (3, 12)
    assert torch.equal(joined[:2, :8], merged.sources)
    assert (joined[:2, 8:] == -1).all()
    # An item that its budget leaves whole beside one that is merged, after a selection.
    mixed = BipartiteMerging().reduce(Uniform().reduce(batch(8, 3), "4"), "3").sources
    assert mixed is not None
    assert mixed[1, :3].tolist() == [0, 1, 2]
