"""Codes for what is rare: a share of the centers are the tokens that are least like every other center.

Source: VQToken (arXiv 2503.16980, section 3.2) names an adaptive k-means (Bhatia 2004) that opens a cluster for a token
far from all of them and joins the two nearest to make room; the published code has plain k-means only. k-means spends
its codes where they lower the squared distance most, so an object in few patches of one frame shares the code of its
background. Farthest-first traversal (Gonzalez 1985) gives it one.

Differs from Bhatia's method: part of the centers stay those of k-means, for codes that are extreme tokens alone
describe the rest of a clip badly; tokens are visited in no order, so the result does not depend on one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenthrift.vqtoken.clustering import Clusters, fill_empty, lloyd, similarities, unit_rows

__all__ = ["with_outliers"]

PASSES = 2  # over all tokens: one gives every new center its tokens, one more settles the borders


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
    for slot in range(int(have.min()), most):
        item = ((have <= slot) & (slot < num_clusters)).nonzero().flatten()
        farthest = likeness[item].masked_fill(~mask[item], torch.inf).argmin(1)
        centers[item, slot] = exact[item, farthest]
        likeness[item] = likeness[item].maximum(similarities(exact[item], centers[item, slot, None])[..., 0])
    return fill_empty(unit, lloyd(unit, mask, centers, PASSES), num_clusters)
