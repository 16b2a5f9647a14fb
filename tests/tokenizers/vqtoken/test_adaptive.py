"""How many clusters: the merging tree is exact, and K follows content where the published rules do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenizers.vqtoken.clips import mixture, noise
from tokenthrift.budget import TokenBudget
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import adaptive
from tokenthrift.vqtoken.adaptive import (
    by_elbow,
    by_error,
    by_gain,
    by_silhouette,
    errors,
    merged,
    silhouettes,
    tree_of,
)
from tokenthrift.vqtoken.clustering import Clusters, cluster, lloyd, unit_tokens
from tokenthrift.vqtoken.config import VQTokenConfig
from tokenthrift.vqtoken.hierarchy import merge_all
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.released import (
    distortion_2025,
    elbow_2025,
    kmeans_2025,
    search_2026,
    seeds_2026,
    silhouette_2026,
)

FEW = settings(deadline=None, max_examples=15)
TRUTHS = (4, 7, 11, 16, 23, 32, 40, 48)


def rank_correlation(a: list[int], b: list[int]) -> float:
    """Spearman's, with mean ranks for ties."""
    ranks = []
    for values in (a, b):
        v = torch.tensor(values, dtype=torch.float64)
        ranks.append((v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num())


def clip(clusters: int, seed: int = 0) -> Tensor:
    return mixture(clusters, 300, width=32, spread=0.35, seed=100 * seed + clusters)[0]


def test_the_chosen_number_follows_the_content() -> None:
    tokens = TokenBatch.from_items([clip(k) for k in TRUTHS])
    out = VQToken().reduce(tokens, TokenBudget.parse("64,e0.15"))
    chosen = [usage.used for usage in out.usage]
    assert rank_correlation(list(TRUTHS), chosen) > 0.95
    assert all(abs(k - truth) <= 1 + truth // 4 for k, truth in zip(chosen, TRUTHS, strict=True))
    assert all(usage.error is not None and usage.error <= 0.15 for usage in out.usage)
    assert chosen == out.mask.sum(1).tolist()


def test_the_published_rule_of_2025_does_not() -> None:
    chosen = []
    for k in TRUTHS:
        tokens = clip(k)
        unit = torch.nn.functional.normalize(tokens, dim=1)
        distortions = []
        for candidate in range(12, 33):
            places = seeds_2026(tokens, candidate, torch.Generator().manual_seed(candidate))
            distortions.append(distortion_2025(tokens, kmeans_2025(tokens, unit[places], 20)))
        chosen.append(elbow_2025(distortions))
    assert all(12 <= k <= 22 for k in chosen)
    assert rank_correlation(list(TRUTHS), chosen) < 0.6


def test_the_published_search_of_2026_stays_within_its_bounds() -> None:
    for k in (4, 48):
        chosen = {most: len(search_2026(clip(k), 12, most, "elbow", 0, 20).centers) for most in (13, 16)}
        assert chosen[13] == 12, "of two candidates the first"
        assert 12 <= chosen[16] <= 16


def test_gain_takes_codes_while_each_explains_enough() -> None:
    curve = torch.tensor([[1.0, 0.5, 0.3, 0.29, 0.21, 0.2], [1.0, 0.99, 0.98, 0.97, 0.96, 0.95]])
    least, most = torch.tensor([1, 1]), torch.tensor([6, 6])
    assert by_gain(curve, 0.07, least, most).tolist() == [5, 1]  # the fifth is worth it, whatever the fourth is
    assert by_gain(curve, 0.3, least, most).tolist() == [2, 1]
    assert by_gain(curve, 0.0, least, most).tolist() == [6, 6]
    assert by_gain(curve, 0.07, least + 2, most - 2).tolist() == [4, 3]
    assert by_gain(curve[:, :1], 0.07, least, least).tolist() == [1, 1]


def test_gain_spends_codes_where_they_explain_most() -> None:
    still, busy = clip(6)[:49].repeat(6, 1), clip(40)[:294]
    tokens = TokenBatch.from_items([still, busy])
    out = VQToken(VQTokenConfig(selection_method="gain", min_gain=0.01)).reduce(tokens, 64)
    few, many = (usage.used for usage in out.usage)
    assert few < 10 < 25 < many
    adaptive_left = sum(usage.error or 0.0 for usage in out.usage)
    even = VQToken().reduce(tokens, [f"{(few + many + 1) // 2},e0.0001"] * 2)
    assert adaptive_left < sum(usage.error or 0.0 for usage in even.usage)


def partition(tokens: int, clusters: int, seed: int) -> tuple[Tensor, Tensor, Clusters]:
    x = noise(seed, 1, tokens, 6)
    unit, mask = unit_tokens(x, None)
    return unit, mask, cluster(x, clusters)


@FEW
@given(tokens=st.integers(1, 40), clusters=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_partition_of_the_tree_has_the_loss_it_says_and_they_are_nested(
    tokens: int, clusters: int, seed: int
) -> None:
    _, _, found = partition(tokens, clusters, seed)
    tree = tree_of(found)
    curve, finer = found.loss()[0] + tree.curve()[0], None
    for k in range(int(found.live.sum()), 0, -1):
        part = found.mapped(tree.at(torch.tensor([k])), k)
        assert bool(part.live.all())
        torch.testing.assert_close(part.loss()[0], curve[k - 1], rtol=1e-6, atol=1e-6)
        if finer is not None:
            pairs = set(zip(finer.labels[0].tolist(), part.labels[0].tolist(), strict=True))
            assert len(pairs) == int(finer.live.sum())
        finer = part
    assert (curve.diff() <= 1e-9).all()


def test_the_pair_that_merges_is_the_cheapest() -> None:
    _, _, found = partition(60, 7, 1)
    joined = tree_of(found).at(torch.tensor([6]))
    losses = []
    for a in range(7):
        for b in range(a + 1, 7):
            maps = torch.tensor([[a if k == b else k - (k > b) for k in range(7)]])
            losses.append(float(found.mapped(maps, 6).loss()))
    assert float(found.mapped(joined, 6).loss()) == pytest.approx(min(losses), abs=1e-7)


def test_clips_of_unequal_numbers_share_a_tree() -> None:
    tokens = [clip(5), clip(9)[:40], clip(3)[:2]]
    found = cluster(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), [12, 7, 2], mask=_mask([300, 40, 2]))
    curves = errors(found, tree_of(found))
    for i, k in enumerate((12, 7, 2)):
        alone = cluster(tokens[i][None], k)
        torch.testing.assert_close(curves[i, :k], errors(alone, tree_of(alone))[0], rtol=1e-6, atol=1e-9)


def _mask(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_silhouettes_of_all_numbers_from_one_product() -> None:
    unit, _, found = partition(80, 9, 3)
    tree = tree_of(found)
    scores = silhouettes(unit, found, tree)[0]
    assert scores[0] == -1
    for k in range(2, 10):
        labels = found.mapped(tree.at(torch.tensor([k])), k).labels[0]
        assert float(scores[k - 1]) == pytest.approx(silhouette_2026(unit[0], labels), abs=1e-5)


def test_silhouette_and_elbow_find_clusters_that_are_far_apart() -> None:
    x, _ = mixture(6, 300, width=64, spread=0.05)
    unit, _ = unit_tokens(x[None], None)
    found = cluster(x[None], 16)
    tree = tree_of(found)
    one, most = torch.tensor([1]), torch.tensor([16])
    assert by_silhouette(silhouettes(unit, found, tree), one, most).item() == 6
    assert by_elbow(errors(found, tree), one, most).item() == 6
    assert by_elbow(errors(found, tree), torch.tensor([8]), torch.tensor([9])).item() == 8


def test_error_rule_takes_the_fewest_within_bounds() -> None:
    curve = torch.tensor([[1.0, 0.5, 0.2, 0.1, 0.0]], dtype=torch.float64)
    bounds = [(0.2, 1, 5, 3), (0.19, 1, 5, 4), (1.0, 1, 5, 1), (0.0, 1, 5, 5), (0.0, 1, 4, 4), (0.9, 3, 5, 3)]
    for target, least, most, expected in bounds:
        targets = torch.tensor([target], dtype=torch.float64)
        assert by_error(curve, targets, torch.tensor([least]), torch.tensor([most])).item() == expected


def test_a_few_passes_only_improve_the_merged_partition() -> None:
    for seed in range(4):
        x, _ = mixture(20, 400, spread=0.8, seed=seed)
        unit, mask = unit_tokens(x[None], None)
        found = cluster(x[None], 24)
        tree, wanted = tree_of(found), torch.tensor([9])
        raw = found.mapped(tree.at(wanted), 9)
        better = merged(unit, mask, found, tree, wanted)
        assert better.loss() <= raw.loss()
        assert better.live.sum() == 9


def chosen(rule: Any, curve: list[float], least: int, most: int) -> int:
    values = torch.tensor([curve], dtype=torch.float64)
    return int(rule(values, torch.tensor([least]), torch.tensor([most])))


@pytest.mark.parametrize(
    ("curve", "least", "most", "expected"),
    [
        ([1.0, 0.0, 0.0], 1, 3, 2),  # three to select from are enough
        ([1.0, 0.0, 0.0], 1, 2, 1),  # of two the fewest
        ([10.0, 9.2, 9.1, 9.05, 9.0], 1, 5, 2),  # the curve is scaled between its own ends
        ([1.0, 0.5, 0.25 - 1e-12, 0.125, 0.0], 1, 5, 2),  # two are as far from the chord but for rounding
        ([5.0, 1.0, 0.9, 0.1, 0.05], 2, 5, 4),  # below the fewest nothing counts
        ([5.0, 4.0, 2.0, 1.9, 0.0], 1, 4, 3),  # nor above the most
    ],
)
def test_the_elbow_of_known_curves(curve: list[float], least: int, most: int, expected: int) -> None:
    assert chosen(by_elbow, curve, least, most) == expected


@pytest.mark.parametrize(
    ("scores", "least", "most", "expected"),
    [
        ([-1.0, 0.5, 0.5 + 1e-9, 0.2], 1, 4, 2),  # equal but for rounding: the fewest
        ([-1.0, 0.9, 0.3, 0.4, 0.8], 3, 4, 4),  # the best of those allowed
    ],
)
def test_the_best_silhouette_of_known_scores(scores: list[float], least: int, most: int, expected: int) -> None:
    assert chosen(by_silhouette, scores, least, most) == expected


def test_equal_tokens_have_no_error_whatever_the_clusters() -> None:
    found = cluster(torch.full((1, 60, 7), 0.3), 4)
    assert errors(found, tree_of(found)).tolist() == [[0.0] * 4]


def test_silhouettes_of_clips_side_by_side_are_those_of_each_alone() -> None:
    outlier = torch.cat([mixture(2, 30, width=6, spread=0.1)[0], 9 * noise(7, 1, 6)])  # alone in its cluster
    clips = [outlier, mixture(3, 12, width=6, spread=0.2, seed=5)[0], noise(8, 1, 6)]
    counts = [5, 3, 1]
    tokens = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=torch.nan)
    unit, mask = unit_tokens(tokens, _mask([len(x) for x in clips]))
    found = cluster(tokens, counts, mask=mask)
    scores = silhouettes(unit, found, tree_of(found))
    for i, (x, count) in enumerate(zip(clips, counts, strict=True)):
        own, _ = unit_tokens(x[None], None)
        alone = cluster(x[None], count)
        tree = tree_of(alone)
        torch.testing.assert_close(scores[i, :count], silhouettes(own, alone, tree)[0], rtol=0, atol=1e-6)
        for k in range(2, count + 1):
            labels = alone.mapped(tree.at(torch.tensor([k])), k).labels[0]
            assert float(scores[i, k - 1]) == pytest.approx(silhouette_2026(own[0], labels), abs=1e-5)
    assert scores[2].tolist() == [-1.0] * 5, "a single cluster has no silhouette"


@pytest.mark.parametrize("fault", ["worse", "empty"])
def test_passes_that_do_not_improve_a_partition_are_left_out(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, mask, found = partition(50, 8, 2)
    tree, four = tree_of(found), torch.tensor([4])
    raw = found.mapped(tree.at(four), 4)

    def spoiled(*_: Any) -> Clusters:
        if fault == "worse":
            return Clusters(3 - raw.labels, raw.sums * 0.9, raw.counts)
        counts = raw.counts.clone()
        counts[0, 3] = 0
        return Clusters(raw.labels, raw.sums * 1.01, counts)  # a lower loss, and a cluster without tokens

    monkeypatch.setattr(adaptive, "lloyd", spoiled)
    assert torch.equal(merged(unit, mask, found, tree, four).labels, raw.labels)
    assert torch.equal(merged(unit, mask, found, tree, four).counts, raw.counts)


def test_a_merged_partition_is_improved_by_three_passes() -> None:
    seeds = range(12)
    losses = []
    for passes in (1, adaptive.REFINEMENTS):
        total = 0.0
        for seed in seeds:
            unit, mask, found = partition(300, 16, seed)
            part = found.mapped(tree_of(found).at(torch.tensor([5])), 5)
            total += float(lloyd(unit, mask, torch.nn.functional.normalize(part.sums, dim=2), passes).loss())
        losses.append(total)
    done = 0.0
    for seed in seeds:
        unit, mask, found = partition(300, 16, seed)
        done += float(merged(unit, mask, found, tree_of(found), torch.tensor([5])).loss())
    assert losses[1] < losses[0]
    assert done == pytest.approx(losses[1], rel=1e-9)


def test_pairs_that_differ_by_rounding_merge_in_order_and_the_arguments_stay() -> None:
    sums = torch.eye(4, dtype=torch.float64)[None] * 3
    sums[0, 2, 3] = 1e-13  # the last two would cost a little less
    counts, live = torch.full((1, 4), 3), torch.ones(1, 4, dtype=torch.bool)
    tree = merge_all(sums, counts, live)
    assert tree.at(torch.tensor([3])).tolist() == [[0, 0, 1, 2]]
    assert tree.at(torch.tensor([9])).tolist() == [[0, 1, 2, 3]], "no more clusters than there were"
    assert bool(live.all())
    assert counts.tolist() == [[3] * 4]


def test_an_item_that_is_down_to_one_cluster_waits_for_the_others() -> None:
    sums = torch.cat([noise(0, 1, 5, 6), noise(1, 1, 5, 6)]).double()
    live = torch.tensor([[True] * 5, [True, True, False, False, False]])
    tree = merge_all(sums, live.long() * 4, live)
    assert bool(tree.losses.isfinite().all())
    assert tree.losses[1, 1:].unique().numel() == 1
    assert tree.at(torch.tensor([1, 1])).tolist()[1][:2] == [0, 0]


def test_merging_never_lowers_the_loss_however_large_the_clusters() -> None:
    counts = torch.randint(1, 10**9, (1, 40), generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(noise(1, 1, 1, 7).double(), dim=2)
    tree = merge_all(counts[..., None] * direction, counts, counts > 0)
    assert (tree.losses.diff() >= 0).all()
