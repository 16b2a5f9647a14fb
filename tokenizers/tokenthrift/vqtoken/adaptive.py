"""How many clusters a clip needs, from one clustering, and codes for what is rare.

Source: adaptive mode of VQToken (arXiv 2503.16980, section 3.2). There, K is searched by a random k-means for each K of
12..32 and a second difference that reads the wrong index: the answer lies between 12 and 22 whatever the clip holds
(`released.py` keeps both published eras of that rule). Here the clusters of the largest K are merged pairwise by least
loss, which gives the loss of every smaller K exactly and makes it fall with K, and one of four rules reads that curve:

* error: the fewest clusters that leave at most a target share of the scatter unexplained (the default);
* gain: the most clusters of which the last still lowers that share by a given amount; over many clips no other way to
  spend as many codes leaves less, as far as the curves are convex;
* elbow: the point farthest from the chord of the curve, both axes scaled to [0, 1], as the published code of 2026;
* silhouette: the largest mean cosine silhouette, exact, over all K from one matrix product.

A few passes over the tokens then improve the chosen partition.

The paper names an adaptive k-means (Bhatia 2004) that opens a cluster for a token far from all of them and joins the
two nearest to make room; the published code has plain k-means only. k-means spends its codes where they lower the
squared distance most, so an object in few patches of one frame shares the code of its background. In `with_outliers` a
share of the centers are the tokens that are least like every other center (farthest-first traversal, Gonzalez 1985).
Unlike Bhatia's method the others stay those of k-means, for codes that are extreme tokens alone describe the rest of a
clip badly; tokens are visited in no order, so the result does not depend on one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.vqtoken.clustering import Clusters, fill_empty, lloyd, similarities, unit_rows
from tokenthrift.vqtoken.hierarchy import Tree, merge_all

__all__ = [
    "by_elbow",
    "by_error",
    "by_gain",
    "by_silhouette",
    "errors",
    "merged",
    "silhouettes",
    "tree_of",
    "with_outliers",
]

REFINEMENTS = 3
PASSES = 2  # over all tokens, with outliers: one gives every new center its tokens, one more settles the borders


def tree_of(clusters: Clusters) -> Tree:
    """All partitions between these clusters and one."""
    return merge_all(clusters.sums, clusters.counts, clusters.live)


def errors(clusters: Clusters, tree: Tree) -> Tensor:
    """(B, K) float64 in [0, 1]: the share of the scatter that k + 1 clusters leave unexplained; never rising with k."""
    scatter = clusters.scatter()[:, None]
    share = (clusters.loss()[:, None] + tree.curve()) / scatter.clamp(min=1e-9)
    return share.where(scatter > 0, 0.0).clamp(max=1)


def by_error(errors: Tensor, targets: Tensor, min_clusters: Tensor, max_clusters: Tensor) -> Tensor:
    """The fewest clusters whose error is at most the target: (B,) int64 from `min_clusters` to `max_clusters`.

    Args:
        errors: (B, K) for k + 1 clusters.
        targets: (B,) float64.
        min_clusters: (B,) int64.
        max_clusters: (B,) int64.
    """
    enough = (errors > targets[:, None]).sum(1) + 1
    return enough.maximum(min_clusters).minimum(max_clusters)


def by_gain(errors: Tensor, min_gain: float, min_clusters: Tensor, max_clusters: Tensor) -> Tensor:
    """The most clusters of which the last lowers the error by at least `min_gain`: (B,) int64 within the bounds.

    Args:
        errors: (B, K) for k + 1 clusters.
        min_gain: Share of the scatter that another cluster has to explain.
        min_clusters: (B,) int64.
        max_clusters: (B,) int64.
    """
    worth = errors[:, :-1] - errors[:, 1:] >= min_gain
    count = torch.arange(worth.shape[1], device=errors.device) + 2
    found = (count * worth).amax(1) if worth.shape[1] else torch.ones_like(min_clusters)
    return found.clamp(min=1).maximum(min_clusters).minimum(max_clusters)


def by_elbow(losses: Tensor, min_clusters: Tensor, max_clusters: Tensor) -> Tensor:
    """The number of clusters farthest from the chord of the loss curve: (B,) int64 within the bounds.

    Args:
        losses: (B, K) for k + 1 clusters.
        min_clusters: (B,) int64.
        max_clusters: (B,) int64; with fewer than three to select from, the rule takes `min_clusters`.
    """
    count = torch.arange(losses.shape[1], device=losses.device) + 1
    first, last = (losses.gather(1, (end - 1).clamp(min=0)[:, None]) for end in (min_clusters, max_clusters))
    across = (count - min_clusters[:, None]) / (max_clusters - min_clusters).clamp(min=1)[:, None]
    down = (losses - last) / (first - last).clamp(min=1e-12)
    inside = (count >= min_clusters[:, None]) & (count <= max_clusters[:, None])
    # The points (0, 1) and (1, 0) are the ends of the chord.
    distance = (1 - across - down).masked_fill(~inside, -torch.inf)
    found = (distance * 2.0**30).round().argmax(1) + 1
    return found.where(max_clusters - min_clusters >= 2, min_clusters)


def by_silhouette(scores: Tensor, min_clusters: Tensor, max_clusters: Tensor) -> Tensor:
    """The number of clusters with the largest score, the fewest among equals: (B,) int64 within the bounds."""
    count = torch.arange(scores.shape[1], device=scores.device) + 1
    inside = (count >= min_clusters[:, None]) & (count <= max_clusters[:, None])
    return (scores * 2.0**20).round().masked_fill(~inside, -torch.inf).argmax(1) + 1


@torch.no_grad()
def silhouettes(unit: Tensor, clusters: Clusters, tree: Tree) -> Tensor:
    """Mean cosine silhouette of every partition of the tree: (B, K) for k + 1 clusters, -1 for a single one.

    A token's own distance is the mean over the other members of its cluster. Its other distance is the least mean
    distance to another cluster. A token alone in its cluster scores 0. Mean distances follow from inner products with
    the sums of the clusters, and sums of merged clusters are sums, so one product serves all K.

    Args:
        unit: (B, N, D) as from `clustering.unit_tokens`.
        clusters: Of the same tokens.
        tree: Of the clusters.
    """
    with torch.autocast(unit.device.type, enabled=False):
        products = unit @ clusters.sums.float().transpose(1, 2)
    real = clusters.labels >= 0
    slots = clusters.counts.shape[1]
    scores = [products.new_full((len(unit),), -1.0)]
    for count in range(2, slots + 1):
        left = tree.clusters.clamp(max=count)
        maps = tree.at(left).where(clusters.live, slots)
        joined = products.new_zeros(*products.shape[:2], slots + 1)
        joined = joined.scatter_add(2, maps[:, None].expand_as(products), products)[..., :count]
        sizes = clusters.counts.new_zeros(len(unit), slots + 1).scatter_add(1, maps, clusters.counts)[:, None, :count]
        label = maps.gather(1, clusters.labels.clamp(min=0))[..., None].clamp(max=count - 1)
        # The mean distance over the others of a cluster: 1 - (s . u - 1) / (n - 1).
        own_size = sizes.expand_as(joined).gather(2, label)
        own = 1 - (joined.gather(2, label) - 1) / (own_size - 1).clamp(min=1)
        others = (1 - joined / sizes.clamp(min=1)).masked_fill(sizes == 0, torch.inf)
        other = others.scatter(2, label, torch.inf).amin(2, keepdim=True)
        score = (other - own) / torch.maximum(other, own).clamp(min=1e-12)
        score = score.masked_fill((own_size < 2) | ~other.isfinite() | ~real[..., None], 0.0)
        scores.append((score.sum((1, 2)) / real.sum(1).clamp(min=1)).where(left > 1, -1.0))
    return torch.stack(scores, 1)


def merged(unit: Tensor, mask: Tensor, clusters: Clusters, tree: Tree, num_clusters: Tensor) -> Clusters:
    """The partition into (B,) `num_clusters` clusters, improved by a few passes where that lowers its loss.

    Args:
        unit: (B, N, D) as from `clustering.unit_tokens`.
        mask: (B, N) bool.
        clusters: Of these tokens.
        tree: Of the clusters.
        num_clusters: (B,) int64.
    """
    found = clusters.mapped(tree.at(num_clusters), int(num_clusters.max()))
    better = lloyd(unit, mask, normalize(found.sums, dim=2), REFINEMENTS)
    keep = (better.loss() < found.loss()) & (better.live == found.live).all(1)
    return Clusters(
        better.labels.where(keep[:, None], found.labels),
        better.sums.where(keep[:, None, None], found.sums),
        better.counts.where(keep[:, None], found.counts),
    )


@torch.no_grad()
def with_outliers(unit: Tensor, mask: Tensor, clusters: Clusters, num_clusters: Tensor) -> Clusters:
    """As many clusters as are asked for: those given, and one around each token that is least like all centers so far.

    Args:
        unit: (B, N, D) as from `clustering.unit_tokens`.
        mask: (B, N) bool.
        clusters: Of these tokens, at most `num_clusters` each.
        num_clusters: (B,) int64, at most the tokens of each clip.
    """
    exact, have, most = unit.double(), clusters.live.sum(1), int(num_clusters.max())
    centers = torch.zeros(len(unit), most, unit.shape[2], dtype=torch.float64, device=unit.device)
    centers[:, : clusters.sums.shape[1]] = unit_rows(clusters.sums)
    likeness = similarities(exact, unit_rows(clusters.sums)).masked_fill(~clusters.live[:, None], -torch.inf).amax(2)
    likeness = likeness.masked_fill(~mask, torch.inf)  # no padding is the farthest
    # Every clip computes every slot, since to pick those that need it would wait for the device once a slot.
    for slot in range(int(have.min()), most):
        needed = ((have <= slot) & (slot < num_clusters))[:, None]
        farthest = likeness.argmin(1)[:, None, None].expand(-1, 1, unit.shape[2])
        center = exact.gather(1, farthest)
        centers[:, slot] = center[:, 0].where(needed, centers[:, slot])
        likeness = likeness.maximum(similarities(exact, center)[..., 0]).where(needed, likeness)
    return fill_empty(unit, lloyd(unit, mask, centers, PASSES), num_clusters)
