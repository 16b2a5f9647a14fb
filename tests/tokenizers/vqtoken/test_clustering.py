"""Clustering: what it finds, that K is exact, and that neither padding, neighbors, precision nor device matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.tokenizers.vqtoken.clips import mixture, noise, same_partition
from tokenthrift.vqtoken import clustering
from tokenthrift.vqtoken.clustering import cluster, nearest, seeds, unit_tokens
from tokenthrift.vqtoken.released import kmeans_2026, seeds_2026

FEW = settings(deadline=None, max_examples=12)


@pytest.mark.parametrize("clusters", [1, 2, 7, 24])
def test_finds_the_clusters_that_are_there(clusters: int) -> None:
    tokens, truth = mixture(clusters, 300, width=64)
    found = cluster(tokens[None], clusters)
    assert same_partition(found.labels[0], truth)
    assert torch.equal(found.counts[0].sort().values, torch.bincount(truth).sort().values)


def test_length_does_not_matter_and_small_clusters_are_found() -> None:
    tokens, truth = mixture(6, 400, width=32)
    truth[6:] = truth[6:].clamp(max=4)  # a cluster of one token
    tokens = noise(1, 6, 32)[truth] + 0.05 * noise(2, 400, 32)
    lengths = 10 ** (4 * torch.rand(400, 1, generator=torch.Generator().manual_seed(3)) - 2)
    assert same_partition(cluster((tokens * lengths)[None], 6).labels[0], truth)


def test_is_about_as_good_as_the_best_of_several_random_starts() -> None:
    for seed in range(3):
        tokens, _ = mixture(20, 1500, width=16, spread=0.7, seed=seed)
        unit, _ = unit_tokens(tokens[None], None)
        baselines = []
        for start in range(4):
            places = seeds_2026(tokens, 16, torch.Generator().manual_seed(start))
            labels = kmeans_2026(tokens, unit[0, places]).labels
            centers = torch.stack([unit[0, labels == k].mean(0) for k in range(16)])
            baselines.append(float((unit[0] - centers[labels]).square().sum()))
        loss = float(cluster(tokens[None], 16).loss())
        assert loss < sum(baselines) / len(baselines)
        assert loss < 1.02 * min(baselines)


def test_error_is_the_share_of_the_scatter_that_is_left() -> None:
    tokens, _ = mixture(9, 200, spread=0.5)
    found = cluster(tokens[None], 5)
    unit = torch.nn.functional.normalize(tokens.double(), dim=1)
    centers = torch.stack([unit[found.labels[0] == k].mean(0) for k in range(5)])
    left = (unit - centers[found.labels[0]]).square().sum()
    torch.testing.assert_close(found.error()[0], left / (unit - unit.mean(0)).square().sum(), rtol=1e-5, atol=0)
    assert found.error()[0] < cluster(tokens[None], 4).error()[0]


@FEW
@given(distinct=st.integers(1, 12), tokens=st.integers(1, 40), wanted=st.integers(1, 45), zero=st.booleans())
def test_every_cluster_wanted_exists_whatever_the_tokens(distinct: int, tokens: int, wanted: int, zero: bool) -> None:
    x = noise(distinct, distinct, 5)[torch.arange(tokens) % distinct]
    if zero:
        x[::3] = 0
    found = cluster(x[None], wanted)
    k = min(wanted, tokens)
    assert torch.bincount(found.labels[0], minlength=k).tolist() == found.counts[0, :k].tolist()
    assert (found.counts[0, :k] > 0).all()
    assert found.counts.sum() == tokens


def test_clusters_of_one_token_have_no_loss_below_zero() -> None:
    found = cluster(noise(0, 4, 30, 7), 30)
    assert found.counts.unique().tolist() == [1]
    assert (found.loss() >= 0).all()
    assert found.loss().max() < 1e-5


def test_equal_frames_fall_into_equal_runs() -> None:
    found = cluster(torch.ones(1, 64, 8), 8, grids=[(16, 2, 2)])
    assert found.labels[0].tolist() == [i // 8 for i in range(64)]
    assert found.scatter().tolist() == found.error().tolist() == [0.0]


def test_tokens_of_length_zero_are_alike_and_unlike_others() -> None:
    x, truth = mixture(3, 30)
    x[truth == 1] = 0
    assert same_partition(cluster(x[None], 3).labels[0], truth)


@pytest.mark.parametrize("length", [1e-33, 1e-40])
def test_tokens_of_hardly_any_length_are_as_those_of_none(length: float) -> None:
    x = noise(0, 1, 8, 4)
    x[0, 3] = length
    x[0, 5] = 0
    x[0, 6] *= 1e-20
    found = cluster(x, 6)
    assert bool(found.sums.isfinite().all())
    assert found.labels[0, 3] == found.labels[0, 5]
    assert found.counts.sum() == 8


@FEW
@example(lengths=[0], wanted=[1, 1, 1, 1], left=False, extra=1)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    wanted=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    left=st.booleans(),
    extra=st.integers(0, 5),
)
def test_a_row_is_the_row_alone(lengths: list[int], wanted: list[int], left: bool, extra: int) -> None:
    items = [mixture(5, max(n, 5), width=8, spread=0.6, seed=i)[0][:n] for i, n in enumerate(lengths)]
    tokens = torch.full((len(items), max(lengths) + extra, 8), torch.nan)
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    for i, item in enumerate(items):
        place = slice(tokens.shape[1] - len(item), None) if left else slice(0, len(item))
        tokens[i, place], mask[i, place] = item, True
    found = cluster(tokens, wanted[: len(items)], mask=mask)
    assert (found.labels[~mask] == -1).all()
    for i, item in enumerate(items):
        if len(item):
            alone = cluster(item[None], wanted[i])
            assert torch.equal(found.labels[i][mask[i]], alone.labels[0])
            torch.testing.assert_close(found.sums[i, : alone.sums.shape[1]], alone.sums[0])


def test_long_clips_beside_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_SAMPLE", 200)
    monkeypatch.setattr(clustering, "_MOST_MERGED", 32)
    long, short = mixture(30, 1500, width=8, spread=0.5)[0], mixture(4, 190, width=8, spread=0.5)[0]
    tokens = pad_sequence([long, short, long], batch_first=True, padding_value=torch.inf)
    mask = torch.arange(1500) < torch.tensor([[1500], [190], [1500]])
    found = cluster(tokens, [40, 20, 12], mask=mask)
    assert torch.equal(found.labels[0], cluster(long[None], 40).labels[0])
    assert torch.equal(found.labels[1, :190], cluster(short[None], 20).labels[0])
    assert torch.equal(found.labels[2], cluster(long[None], 12).labels[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype: torch.dtype) -> None:
    tokens = mixture(8, 500, spread=0.4)[0].to(dtype)
    found, reference = cluster(tokens[None], 8), cluster(tokens.float()[None], 8)
    assert torch.equal(found.labels, reference.labels)
    assert torch.equal(found.sums, reference.sums)


def test_autocast_and_coarse_products_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mixture(12, 500, spread=0.8)[0][None]
    expected = cluster(tokens, 12).labels
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cluster(tokens, 12).labels, expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")  # all products in float64 then
    assert torch.equal(cluster(tokens, 12).labels, expected)


def test_near_ties_are_decided_in_float64_and_ties_by_number() -> None:
    unit, _ = unit_tokens(noise(0, 1, 2000, 33), None)
    base = torch.nn.functional.normalize(noise(1, 1, 6, 33).double(), dim=2)
    shifted = torch.nn.functional.normalize(base + 1e-9 * noise(2, 1, 6, 33).double(), dim=2)
    centers = torch.cat([base, shifted, base], 1)
    live = torch.ones(1, 18, dtype=torch.bool)
    found = nearest(unit, centers, live)
    exact = unit.double() @ centers.transpose(1, 2)
    best = exact.amax(2)
    assert (best - exact.gather(2, found[..., None])[..., 0]).max() < 1e-11
    assert found.max() < 12
    live[:, :6] = False
    assert set(nearest(unit, centers, live).unique().tolist()) <= set(range(6, 18))


def test_blocks_of_tokens_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = mixture(8, 300, spread=0.5)[0][None]
    expected = cluster(tokens, 8).labels
    monkeypatch.setattr(clustering, "_BLOCK", 50)
    assert torch.equal(cluster(tokens, 8).labels, expected)


def test_the_same_bits_again_and_no_global_randomness() -> None:
    tokens = mixture(8, 400, spread=0.5)[0][None]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = cluster(tokens, 8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = cluster(tokens, 8)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.sums, again.sums)


def test_a_generator_seeds_by_chance_and_reproducibly() -> None:
    unit, mask = unit_tokens(mixture(8, 400, spread=0.5)[0][None], None)
    drawn = [seeds(unit, mask, torch.tensor([8]), torch.Generator().manual_seed(i))[0].tolist() for i in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 8
    tokens, truth = mixture(5, 300, width=64)
    found = cluster(tokens[None], 5, generator=torch.Generator().manual_seed(3))
    assert same_partition(found.labels[0], truth)


def test_numbers_follow_mean_time_then_raster() -> None:
    directions = torch.eye(4)
    clip = directions[0].expand(4, 2, 3, 4).clone()  # T, H, W, D: background all over
    clip[3] = directions[3]  # the whole last frame
    clip[:, 1, 2] = directions[2]  # a place, all the time: like the background in time, below its middle
    clip[0, 0, 0] = directions[1]  # a flash in the first frame
    found = cluster(clip.flatten(0, 2)[None], 4, grids=[(4, 2, 3)]).labels.view(4, 2, 3)
    assert found[0, 0, 0] == 0
    assert found[1, 0, 1] == 1
    assert found[1, 1, 2] == 2
    assert found[3, 0, 0] == 3


def test_bad_tokens_and_bad_wishes_raise() -> None:
    tokens = torch.ones(3, 5, 4)
    tokens[1, 2, 0], tokens[2, 4] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"items \[1, 2\]"):
        cluster(tokens, 2)
    with pytest.raises(ValueError, match="at least 1 cluster"):
        cluster(tokens[:1], 0)
    with pytest.raises(ValueError, match="2 x 2 x 2 cells"):
        cluster(tokens[:1], 2, grids=[(2, 2, 2)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_labels_are_those_of_the_cpu(spread: float) -> None:
    tokens: Tensor = mixture(40, 8000, width=256, spread=spread)[0].view(2, 4000, 256)
    here, there = cluster(tokens, [32, 64]), cluster(tokens.cuda(), [32, 64])
    assert torch.equal(there.labels.cpu(), here.labels)
    torch.testing.assert_close(there.sums.cpu(), here.sums, rtol=1e-9, atol=1e-9)
