"""The published rules of VQToken as they were, in both eras, for comparison and for published weights.

Source: VQToken (arXiv 2503.16980) and its code: "2025" is the snapshot of September 2025, "2026" the refactoring of
July and August 2026 that evaluation harnesses run. What is known to be wrong in them is kept here on purpose, and said;
`clustering.py` and `adaptive.py` are what to use. Both eras treat one clip at a time, (N, D) tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = [
    "Fit",
    "code_means_2025",
    "code_means_2026",
    "distortion_2025",
    "distortion_2026",
    "elbow_2025",
    "elbow_2026",
    "first_occurrence",
    "fit_2025",
    "fit_2026",
    "kmeans_2025",
    "kmeans_2026",
    "search_2025",
    "search_2026",
    "seeds_2025",
    "seeds_2026",
    "silhouette_2025",
    "silhouette_2026",
]


class Fit(NamedTuple):
    """A k-means result: labels (N,) int64, centers (K, D) float32, and how many iterations it took."""

    labels: Tensor
    centers: Tensor
    iterations: int


def kmeans_2025(tokens: Tensor, centers: Tensor, max_iterations: int = 300, tolerance: float = 1e-4) -> Fit:
    """The fit of 2025 from given centers.

    Labels and centers that come back are those from before the last update, one step stale. Tokens are divided by
    their length without a guard, so a token of length zero is NaN.

    Args:
        tokens: (N, D).
        centers: (K, D) to start from.
        max_iterations: 300 in the published fixed mode, 100 in its search.
        tolerance: On the Frobenius norm of the update.
    """
    x = tokens.float()
    x = x / x.norm(dim=1, keepdim=True)
    centers = centers.float()
    for done in range(1, max_iterations + 1):
        labels = (1 - x @ normalize(centers, dim=1).T).argmin(1)
        new = _means(x, labels, centers)
        if (new - centers).norm() < tolerance:
            break
        if done < max_iterations:
            centers = new
    return Fit(labels, centers, done)


def kmeans_2026(tokens: Tensor, centers: Tensor, max_iterations: int = 50, tolerance: float = 1e-4) -> Fit:
    """The fit of 2026 from given centers: as in 2025, with a guarded length and a last assignment to the new centers.

    Args:
        tokens: (N, D).
        centers: (K, D) to start from.
        max_iterations: 50 for a fixed K, 100 in the search.
        tolerance: On the Frobenius norm of the update.
    """
    x = normalize(tokens.float(), dim=1, eps=1e-12)
    centers = centers.float()
    done, shift = 0, float("inf")
    while done < max_iterations and shift > tolerance:
        labels = (x @ normalize(centers, dim=1).T).argmax(1)
        new = _means(x, labels, centers)
        shift, centers = float((new - centers).norm()), new
        done += 1
    return Fit((x @ normalize(centers, dim=1).T).argmax(1), centers, done)


def seeds_2026(tokens: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ of 2026: (clusters,) int64 indices. Draws depend on the device of the generator and on torch's release.

    Args:
        tokens: (N, D).
        clusters: At most N.
        generator: On the device of the tokens; published with seed 0 for every clip.
    """
    x = normalize(tokens.float(), dim=1, eps=1e-12)
    indices = [torch.randint(len(x), (1,), generator=generator, device=x.device)]
    distance = (x - x[indices[0]]).square().sum(1)
    for _ in range(clusters - 1):
        weights = distance if bool(distance.sum() > 0) else torch.ones_like(distance)
        indices.append(torch.multinomial(weights, 1, generator=generator))
        distance = distance.minimum((x - x[indices[-1]]).square().sum(1))
    return torch.cat(indices)


def first_occurrence(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Renumbers clusters by their first token, the canonical order of 2026; empty ones come last.

    Args:
        labels: (N,) int64.
        clusters: How many there are.

    Returns:
        (N,) new labels, and (clusters,) the old number of each new one.
    """
    member = labels == torch.arange(clusters, device=labels.device)[:, None]
    first = member.long().argmax(1).where(member.any(1), len(labels))
    order = first.argsort(stable=True)
    return order.argsort()[labels], order


def code_means_2025(tokens: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The codebook of 2025: means of unit tokens, so at most of length 1; the row of an empty cluster is zero.

    The published code sums in the dtype of the model; here sums are float32.

    Args:
        tokens: (N, D) of any floating-point dtype, no row of length zero.
        labels: (N,) int64.
        clusters: Number of clusters K.

    Returns:
        (K, D) in the dtype of the tokens.
    """
    x = tokens.float() / tokens.float().norm(dim=1, keepdim=True)
    return _means(x, labels, x.new_zeros(clusters, x.shape[1])).to(tokens.dtype)


def code_means_2026(tokens: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """The codebook of 2026: means of unit tokens, so at most of length 1; an empty cluster keeps its fitted center.

    Args:
        tokens: (N, D) of any floating-point dtype.
        labels: (N,) int64.
        centers: (K, D) float32.

    Returns:
        (K, D) in the dtype of the tokens.
    """
    return _means(normalize(tokens.float(), dim=1, eps=1e-12), labels, centers).to(tokens.dtype)


def distortion_2025(tokens: Tensor, fit: Fit) -> float:
    """Squared Euclidean distances of unit tokens to their centers, summed."""
    x = tokens.float() / tokens.float().norm(dim=1, keepdim=True)
    return float((x - fit.centers[fit.labels]).square().sum())


def distortion_2026(tokens: Tensor, fit: Fit) -> float:
    """Cosine distances of tokens to their centers, summed."""
    x = normalize(tokens.float(), dim=1, eps=1e-12)
    return float((1 - (x * normalize(fit.centers, dim=1)[fit.labels]).sum(1)).sum())


def elbow_2025(distortions: Sequence[float], min_clusters: int = 12) -> int:
    """K from the distortions of K = min_clusters, min_clusters + 1, ... as in 2025, where that was 12 to 32.

    The second difference peaks at index j for K = min_clusters + 1 + j, but the code answers j + 4, and at least
    `min_clusters`. With fewer than three candidates, for which the published code has no answer, the first.
    """
    if len(distortions) < 3:
        return min_clusters
    return max(min_clusters, int(torch.tensor(distortions).diff(n=2).argmax()) + 2 + 2)


def elbow_2026(distortions: Sequence[float], min_clusters: int) -> int:
    """K from the distortions of K = min_clusters, min_clusters + 1, ... as in 2026: farthest from the scaled chord.

    With fewer than three candidates, the first.
    """
    y = torch.tensor(distortions, dtype=torch.float64)
    if len(y) < 3:
        return min_clusters
    x = torch.linspace(0, 1, len(y), dtype=torch.float64)
    y = (y - y.min()) / (y.max() - y.min()).clamp(min=1e-12)
    across, down = x[-1] - x[0], y[-1] - y[0]
    return min_clusters + int((across * (y - y[0]) - down * (x - x[0])).abs().argmax())


def silhouette_2025(candidates: Sequence[int]) -> int:
    """K as in 2025: its score ignores the labels, all scores are equal, and the first candidate wins (12)."""
    return candidates[0]


def silhouette_2026(tokens: Tensor, labels: Tensor) -> float:
    """Exact mean cosine silhouette of a partition; a token alone scores 0, fewer than two clusters -1.

    Args:
        tokens: (N, D).
        labels: (N,) int64.
    """
    x = normalize(tokens.float(), dim=1, eps=1e-12)
    _, labels, sizes = labels.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return -1.0
    sums = x.new_zeros(len(sizes), x.shape[1]).index_add(0, labels, x)
    products = x @ sums.T
    own_sum, size = products.gather(1, labels[:, None])[:, 0], sizes[labels]
    own = 1 - (own_sum - (x * x).sum(1)) / (size - 1).clamp(min=1)
    others = (1 - products / sizes).scatter(1, labels[:, None], torch.inf)
    other = others.amin(1)
    score = (other - own) / torch.maximum(own, other).clamp(min=1e-12)
    return float(score.where(size > 1, 0.0).mean())


def fit_2026(tokens: Tensor, clusters: int, seed: int, max_iterations: int = 50) -> Fit:
    """Seeds and fit of 2026 for one clip."""
    generator = torch.Generator(tokens.device).manual_seed(seed)
    x = normalize(tokens.float(), dim=1, eps=1e-12)
    return kmeans_2026(tokens, x[seeds_2026(tokens, clusters, generator)], max_iterations)


def seeds_2025(tokens: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ of 2025: (clusters,) int64 indices; as in 2026, but 1e-6 is added to every squared distance.

    Args:
        tokens: (N, D).
        clusters: At most N.
        generator: On the device of the tokens; the published code draws from the global one, which nothing seeds.

    Raises:
        ValueError: A token has length zero, for which the published code divides by zero.
    """
    length = tokens.float().norm(dim=1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError("the rules of 2025 cannot divide a token of length zero; use compat 'corrected'")
    x = tokens.float() / length
    indices = [torch.randint(len(x), (1,), generator=generator, device=x.device)]
    distance = (x - x[indices[0]]).square().sum(1)
    for _ in range(clusters - 1):
        indices.append(torch.multinomial(distance + 1e-6, 1, generator=generator))
        distance = distance.minimum((x - x[indices[-1]]).square().sum(1))
    return torch.cat(indices)


def fit_2025(tokens: Tensor, clusters: int, generator: torch.Generator, max_iterations: int = 50) -> Fit:
    """Seeds and fit of 2025 for one clip; its fixed mode, meant to stop at 50, cannot run as published."""
    x = tokens.float() / tokens.float().norm(dim=1, keepdim=True)
    return kmeans_2025(tokens, x[seeds_2025(tokens, clusters, generator)], max_iterations)


def search_2025(
    tokens: Tensor,
    min_clusters: int,
    max_clusters: int,
    rule: str,
    generator: torch.Generator,
    max_iterations: int = 100,
) -> Fit:
    """The search of 2025: a fit for every K, 21 of them from 12 to 32, and one more at the K that they lead to.

    The last fit draws seeds of its own, so it is not the one that was scored. The silhouette is the same for all, so
    only its last fit is made.

    Args:
        tokens: (N, D).
        min_clusters: Fewest clusters; at most N.
        max_clusters: Most clusters; at most N.
        rule: "elbow" or "silhouette".
        generator: On the device of the tokens; of all fits, one after the other.
        max_iterations: Most iterations of every fit.
    """
    candidates = range(min_clusters, max_clusters + 1)
    if rule == "silhouette":
        chosen = silhouette_2025(candidates)
    else:
        fits = (fit_2025(tokens, k, generator, max_iterations) for k in candidates)
        # From a low `min_clusters` with few candidates, the wrong index can lie beyond the last.
        chosen = min(elbow_2025([distortion_2025(tokens, fit) for fit in fits], min_clusters), max_clusters)
    return fit_2025(tokens, chosen, generator, max_iterations)


def search_2026(
    tokens: Tensor, min_clusters: int, max_clusters: int, rule: str, seed: int, max_iterations: int = 100
) -> Fit:
    """The search of 2026: an independent fit for every K within the bounds; returns the chosen one.

    Args:
        tokens: (N, D).
        min_clusters: Fewest clusters; at most N.
        max_clusters: Most clusters; at most N, or N - 1 for the silhouette.
        rule: "elbow" or "silhouette".
        seed: Of every fit.
        max_iterations: Most iterations of every fit.
    """
    max_clusters = max(min_clusters, min(max_clusters, len(tokens) - (rule == "silhouette")))
    fits = [fit_2026(tokens, k, seed, max_iterations) for k in range(min_clusters, max_clusters + 1)]
    if rule == "elbow":
        return fits[elbow_2026([distortion_2026(tokens, fit) for fit in fits], min_clusters) - min_clusters]
    scores = [silhouette_2026(tokens, fit.labels) for fit in fits]
    return fits[scores.index(max(scores))]


def _means(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Means of the members in float32; a cluster without any keeps its center."""
    sums = torch.zeros_like(centers).index_add(0, labels, x)
    counts = torch.bincount(labels, minlength=len(centers))[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), centers)
