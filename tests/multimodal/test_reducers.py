"""What each reducer computes; the laws of the budget interface over all of them are in `tests/laws`."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.multimodal.budget_strategies import budgets
from tokenthrift.budget import BudgetError, ItemSize, TokenBudget
from tokenthrift.reducers import (
    AveragePooling,
    BipartiteMerging,
    ItemReducer,
    NormPruning,
    Prefix,
    RandomSubset,
    Stacking,
    TokenReducer,
    Uniform,
)
from tokenthrift.reducers.pooling import window_starts
from tokenthrift.tokens import TokenBatch

REDUCERS: list[ItemReducer] = [
    Uniform(),
    RandomSubset(seed=3),
    Prefix(),
    NormPruning(),
    AveragePooling(),
    Stacking(rate=40),
    BipartiteMerging(),
]
MERGING = (AveragePooling, Stacking, BipartiteMerging)
LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=4)
EVERY = pytest.mark.parametrize("reducer", REDUCERS, ids=lambda reducer: type(reducer).__name__)
FEW = settings(deadline=None, max_examples=40)


def batch_of(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32, coded: bool = False) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    items = [torch.randn(n, 6, generator=generator).to(dtype) for n in lengths]
    tokens = TokenBatch.from_items(items, seconds=[n / 10 for n in lengths])
    return replace(tokens, codes=tokens.positions * 7) if coded else tokens


def planned(reducer: TokenReducer, lengths: list[int], budget: TokenBudget) -> list[int]:
    return [u.used for u in reducer.plan([ItemSize(native=n, seconds=n / 10) for n in lengths], budget)]


def legal(reducer: TokenReducer, lengths: list[int], budget: TokenBudget) -> bool:
    """Whether the reducer takes the budget: stacking has fewest tokens below which it cannot go."""
    try:
        planned(reducer, lengths, budget)
    except BudgetError:
        assert isinstance(reducer, Stacking)
        return False
    return True


def row(tokens: TokenBatch, i: int) -> tuple[Tensor, list[int], list[int] | None, list[float] | None]:
    real = tokens.mask[i]
    codes, sizes = (None if v is None else v[i][real].tolist() for v in (tokens.codes, tokens.sizes))
    return tokens.embeddings[i][real], tokens.positions[i][real].tolist(), codes, sizes


def assert_rows_equal(a: TokenBatch, i: int, b: TokenBatch, j: int) -> None:
    (x, *rest), (y, *others) = row(a, i), row(b, j)
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert rest[0] == others[0]
    for own, other in zip(rest[1:], others[1:], strict=True):
        assert own == other or own is None or other is None
    assert a.usage[i] == b.usage[j]


@EVERY
@FEW
@given(lengths=LENGTHS, budget=budgets(), seed=st.integers(0, 99))
def test_never_exceeds_and_uses_what_it_planned(
    reducer: ItemReducer, lengths: list[int], budget: TokenBudget, seed: int
) -> None:
    assume(legal(reducer, lengths, budget))
    tokens = batch_of(lengths, seed)
    out = reducer.reduce(tokens, budget)
    used = out.mask.sum(1).tolist()
    assert not reducer.support.adaptive
    assert used == planned(reducer, lengths, budget) == [u.used for u in out.usage]
    assert lengths == [u.native for u in out.usage]
    for n, native in zip(used, lengths, strict=True):
        assert n <= budget.cap(native, native / 10) <= native
    for i, native in enumerate(lengths):
        positions = row(out, i)[1]
        assert positions == sorted(set(positions))
        assert all(0 <= p < native for p in positions)
    assert out.seconds == tokens.seconds


@EVERY
def test_ties_do_not_depend_on_the_batch(reducer: ItemReducer) -> None:
    items = [torch.ones(n, 5) * scale for n, scale in ((24, 0.1), (17, 1.0), (9, 0.0))]
    budget = TokenBudget(retention=0.3)
    out = reducer.reduce(TokenBatch.from_items(items), budget)
    for i, item in enumerate(items):
        alone = reducer.reduce(TokenBatch.from_items([item]), budget)
        assert_rows_equal(out, i, alone, 0)
        if not isinstance(reducer, Stacking):
            torch.testing.assert_close(row(out, i)[0], item[: out.usage[i].used])


def keeps_prefixes(reducer: ItemReducer, native: int, few: int, more: int) -> bool:
    """Whether the tokens of a small budget are the first ones of a larger budget, bit for bit."""
    short, long = (reducer.reduce(batch_of([native]), TokenBudget(max_tokens=n)) for n in (few, more))
    (x, kept, *_), (y, others, *_) = row(short, 0), row(long, 0)
    return kept == others[: len(kept)] and torch.equal(x[:, :6], y[: len(x), :6])


@EVERY
def test_reducers_are_called_nested_where_they_keep_prefixes(reducer: ItemReducer) -> None:
    found = [keeps_prefixes(reducer, 30, few, more) for few, more in ((3, 4), (5, 10), (7, 29), (12, 18))]
    assert all(found) == reducer.support.nested


@pytest.mark.parametrize("reducer", [r for r in REDUCERS if r.support.nested], ids=lambda r: type(r).__name__)
@FEW
@given(native=st.integers(0, 30), few=st.integers(1, 30), more=st.integers(0, 20))
def test_nested_reducers_keep_prefixes(reducer: ItemReducer, native: int, few: int, more: int) -> None:
    assert keeps_prefixes(reducer, native, few, few + more)


@EVERY
def test_every_kept_token_passes_a_gradient_on(reducer: ItemReducer) -> None:
    embeddings = torch.randn(2, 12, 6, requires_grad=True)
    out = reducer.reduce(TokenBatch.from_embeddings(embeddings), TokenBudget(max_tokens=5))
    out.embeddings.sum().backward()
    assert embeddings.grad is not None
    reached = embeddings.grad.abs().sum(-1) > 0
    expected = torch.ones_like(reached) if isinstance(reducer, MERGING) else torch.zeros_like(reached)
    assert torch.equal(reached, expected.scatter(1, out.positions, True))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay_and_agree_with_float32(reducer: ItemReducer, dtype: torch.dtype) -> None:
    tokens = batch_of([19, 4], dtype=dtype)
    out = reducer.reduce(tokens, TokenBudget(retention=0.5))
    assert out.embeddings.dtype == dtype
    reference = reducer.reduce(replace(tokens, embeddings=tokens.embeddings.float()), TokenBudget(retention=0.5))
    assert torch.equal(out.positions, reference.positions)
    torch.testing.assert_close(out.embeddings.float(), reference.embeddings, rtol=1e-2, atol=1e-2)


@EVERY
def test_memory_layout_does_not_matter(reducer: ItemReducer) -> None:
    tokens = batch_of([15, 15])
    strided = tokens.embeddings.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    a, b = (
        reducer.reduce(replace(tokens, embeddings=e), TokenBudget(max_tokens=4)) for e in (strided, tokens.embeddings)
    )
    assert torch.equal(a.embeddings, b.embeddings)
    assert torch.equal(a.positions, b.positions)


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("budget", ["2", "100%"])
def test_broken_real_tokens_raise_and_name_their_item(reducer: ItemReducer, value: float, budget: str) -> None:
    tokens = batch_of([5, 5])
    tokens.embeddings[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"items \[1\]"):
        reducer.reduce(tokens, TokenBudget.parse(budget))


@EVERY
def test_what_is_not_honored_raises(reducer: ItemReducer) -> None:
    tokens = batch_of([5])
    with pytest.raises(BudgetError, match="target_error"):
        reducer.reduce(tokens, TokenBudget(target_error=0.05))
    with pytest.raises(BudgetError, match="unknown duration"):
        reducer.reduce(replace(tokens, seconds=None), TokenBudget(tokens_per_second=4.0))
    with pytest.raises(BudgetError, match="min_tokens"):
        reducer.reduce(tokens, TokenBudget(retention=0.1))


@pytest.mark.parametrize(
    "reducer", [r for r in REDUCERS if not isinstance(r, Stacking)], ids=lambda r: type(r).__name__
)
def test_nothing_may_be_left_where_the_floor_allows_it(reducer: ItemReducer) -> None:
    out = reducer.reduce(batch_of([5, 0]), TokenBudget(retention=0.1, min_tokens=0))
    assert out.embeddings.shape == (2, 0, 6)
    assert [u.used for u in out.usage] == [0, 0]


@pytest.mark.parametrize("reducer", [r for r in REDUCERS if isinstance(r, MERGING)], ids=lambda r: type(r).__name__)
@FEW
@given(lengths=LENGTHS, first=st.integers(1, 30), second=st.integers(1, 30))
def test_mass_is_kept_also_over_two_reductions(
    reducer: ItemReducer, lengths: list[int], first: int, second: int
) -> None:
    out = reducer.reduce(
        reducer.reduce(batch_of(lengths), TokenBudget(max_tokens=first)), TokenBudget(max_tokens=second)
    )
    if out.sizes is None:
        assert max(lengths) <= min(first, second)
    else:
        assert out.sizes.sum(1).tolist() == lengths
        assert (out.sizes[out.mask] >= 1).all()


@pytest.mark.parametrize("reducer", [AveragePooling(), BipartiteMerging()], ids=lambda r: type(r).__name__)
@FEW
@given(lengths=LENGTHS, first=st.integers(1, 30), second=st.integers(1, 30))
def test_weighted_averages_keep_the_mean_also_over_two_reductions(
    reducer: ItemReducer, lengths: list[int], first: int, second: int
) -> None:
    tokens = batch_of(lengths)
    out = reducer.reduce(reducer.reduce(tokens, TokenBudget(max_tokens=first)), TokenBudget(max_tokens=second))
    weights = out.mask.float() if out.sizes is None else out.sizes
    torch.testing.assert_close(
        (out.embeddings * weights[..., None]).sum(1), tokens.embeddings.sum(1), rtol=1e-4, atol=1e-4
    )


def test_uniform_takes_the_middles() -> None:
    out = Uniform().reduce(batch_of([10, 3]), TokenBudget(max_tokens=3))
    assert row(out, 0)[1] == [1, 5, 8]
    assert row(out, 1)[1] == [0, 1, 2]


def test_selection_carries_the_tokens_and_codes_of_its_positions() -> None:
    tokens = batch_of([20], coded=True)
    for reducer in (Uniform(), RandomSubset(), Prefix(), NormPruning()):
        out = reducer.reduce(tokens, TokenBudget(max_tokens=6))
        assert torch.equal(out.embeddings[0], tokens.embeddings[0, out.positions[0]])
        assert out.codes is not None
        assert torch.equal(out.codes, out.positions * 7)


def test_random_positions_follow_the_seed() -> None:
    positions = {
        tuple(row(RandomSubset(seed).reduce(batch_of([30]), TokenBudget(max_tokens=8)), 0)[1]) for seed in range(20)
    }
    assert len(positions) == 20
    assert set().union(*positions) == set(range(30))


def test_norm_pruning_keeps_the_largest_in_order_and_the_earlier_of_equals() -> None:
    embeddings = torch.tensor([3.0, -5.0, 1.0, 3.0, 5.0, 3.0])[:, None]
    out = NormPruning().reduce(TokenBatch.from_items([embeddings]), TokenBudget(max_tokens=4))
    assert row(out, 0)[1] == [0, 1, 3, 4]


@FEW
@given(native=st.integers(1, 60), first=st.integers(1, 20), factor=st.integers(1, 5))
def test_windows_cover_evenly_and_pooling_composes(native: int, first: int, factor: int) -> None:
    cap = min(first, native)
    lengths = window_starts(native, cap).diff()
    assert int(lengths.sum()) == native
    assert int(lengths.max() - lengths.min()) <= 1
    tokens, pool = batch_of([native]), AveragePooling()
    if first * factor <= native:
        once = pool.reduce(tokens, TokenBudget(max_tokens=first))
        twice = pool.reduce(pool.reduce(tokens, TokenBudget(max_tokens=first * factor)), TokenBudget(max_tokens=first))
        torch.testing.assert_close(once.embeddings, twice.embeddings, rtol=1e-5, atol=1e-5)


def test_average_pooling_is_the_mean_of_each_window() -> None:
    tokens = batch_of([7])
    out = AveragePooling().reduce(tokens, TokenBudget(max_tokens=3))
    x = tokens.embeddings[0]
    expected = torch.stack([x[0:2].mean(0), x[2:4].mean(0), x[4:7].mean(0)])
    torch.testing.assert_close(out.embeddings[0], expected)
    assert row(out, 0)[1:] == ([0, 2, 4], None, [2.0, 2.0, 3.0])


def test_stacking_concatenates_and_fills_with_zeros() -> None:
    tokens = batch_of([5, 2])
    out = Stacking(rate=3).reduce(tokens, TokenBudget(max_tokens=2))
    x, y = tokens.items()
    assert torch.equal(out.embeddings[0, 0], torch.cat([x[0], x[1], torch.zeros(6)]))
    assert torch.equal(out.embeddings[0, 1], torch.cat([x[2], x[3], x[4]]))
    assert torch.equal(out.embeddings[1], torch.cat([y, torch.zeros(2, 12)], dim=1))


@EVERY
@FEW
@given(lengths=LENGTHS, budget=budgets())
def test_the_width_never_depends_on_the_batch(reducer: ItemReducer, lengths: list[int], budget: TokenBudget) -> None:
    assume(legal(reducer, lengths, budget))
    factor = reducer.rate if isinstance(reducer, Stacking) else 1
    assert reducer.reduce(batch_of(lengths), budget).embeddings.shape[2] == 6 * factor


def test_stacking_names_the_fewest_tokens_it_can_keep() -> None:
    with pytest.raises(BudgetError) as caught:
        Stacking(rate=3).plan([10], TokenBudget(max_tokens=3))
    assert caught.value.nearest == 4
    assert planned(Stacking(rate=3), [10], TokenBudget(max_tokens=4)) == [4]
    with pytest.raises(ValueError, match="at least 2"):
        Stacking(rate=1)


def test_merging_joins_the_most_similar_first() -> None:
    a, b, c = torch.eye(3)
    x = torch.stack([a, b, c, 3 * b, 2 * c, a])  # even positions meet odd ones: 0 with 5; 2 has no equal; 4 has none
    out = BipartiteMerging().reduce(TokenBatch.from_items([x]), TokenBudget(max_tokens=5))
    assert row(out, 0)[1:] == ([0, 1, 2, 3, 4], None, [2.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(out.embeddings[0], x[:5])
    out = BipartiteMerging().reduce(TokenBatch.from_items([x]), TokenBudget(max_tokens=1))
    torch.testing.assert_close(out.embeddings[0, 0], x.mean(0))


def test_merging_reconstructs_clusters_better_than_selection() -> None:
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(0, 20, (300,), generator=generator)
    x = torch.randn(20, 32, generator=generator)[cluster] + 0.1 * torch.randn(300, 32, generator=generator)
    errors = {}
    for reducer in (BipartiteMerging(), Uniform(), RandomSubset()):
        kept = reducer.reduce(TokenBatch.from_items([x]), TokenBudget.parse("10%")).items()[0]
        errors[type(reducer)] = float(torch.cdist(x, kept).min(1).values.mean())
    assert errors[BipartiteMerging] < 0.6 * min(errors[Uniform], errors[RandomSubset])
