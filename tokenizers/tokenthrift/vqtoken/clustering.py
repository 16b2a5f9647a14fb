"""Cosine k-means over all patches of a clip: the codebook of VQToken and its index map.

Source: VQToken (arXiv 2503.16980, section 3): the tokens of a clip, divided by their length, are clustered by k-means
with cosine similarity; a code is the mean of its cluster. What differs from the published code, which `released.py`
keeps:

* One matrix product an iteration. Tokens are normalized once, and only those that change cluster move between the sums.
* No random numbers unless a generator is given. On an even sample of the clip, seeds are taken in rounds where the
  squared distance to the nearest seed accumulates; twice as many as needed, merged pairwise by least loss
  (`hierarchy.py`), then improved on the sample and last on all tokens.
* The same labels on every device, in every batch and at every thread count. Unit tokens lie on a grid of 2^-26, so
  float64 sums of them do not round, whatever the order. A token whose best two similarities nearly tie in float32 is
  compared again in float64, and exact ties go to the lower cluster.
* Clips of unequal length are clustered as one batch; padding is never read.
* No cluster stays empty: what is left empty takes the farthest token of the cluster with the largest loss or, where
  all its tokens are alike, half of them. So K is exactly what the caller asks for, up to the number of tokens.
* Clusters are numbered by mean time and then raster order (`token_hash.py`), not in the order of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.vqtoken.hierarchy import merge_all
from tokenthrift.vqtoken.token_hash import Grid, Layout, central_cells, first_tokens, layout_of, ranks

__all__ = [
    "Clusters",
    "cluster",
    "fill_empty",
    "find",
    "lloyd",
    "nearest",
    "number",
    "seeds",
    "similarities",
    "unit_rows",
    "unit_tokens",
]

ITERATIONS = 20
SETTLED = 1e-3
"""Share of the tokens of a clip that may still change cluster when the iterations end."""
_GRID = 2.0**26
_SAMPLE = 2048
_SHORTEST = 1e-30  # of a token that has a direction: dividing the grid by less would overflow float32
_MOST_MERGED = 512  # seeds up to which twice as many are taken; above, merging would cost more than it gains
_NEAR_TIE = 1e-5  # twice the error of a float32 product of unit vectors, amply
_TIE = 2.0**40
_BLOCK = 2**24  # similarities held at a time


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """A partition of the tokens of B clips into at most K clusters each.

    Attributes:
        labels: (B, N) int64 cluster of every token, -1 in padding.
        sums: (B, K, D) float64 sums of the unit tokens of every cluster.
        counts: (B, K) int64 numbers of tokens, 0 in slots beyond the clusters of an item.
    """

    labels: Tensor
    sums: Tensor
    counts: Tensor

    @property
    def live(self) -> Tensor:
        """(B, K) bool: which slots are clusters."""
        return self.counts > 0

    def scatter(self) -> Tensor:
        """(B,) float64: squared distances of the unit tokens from their mean over the clip, summed.

        Tokens that are alike to within rounding scatter by exactly 0.
        """
        size = self.counts.sum(1)
        total = self.sums.sum(1).square().sum(1) / size.clamp(min=1)
        spread = size - total
        return spread.where(spread > 1e-6 * size, 0.0)

    def loss(self) -> Tensor:
        """(B,) float64: squared distances of the unit tokens from the means of their clusters, summed."""
        held = self.sums.square().sum(2) / self.counts.clamp(min=1)
        return (self.counts.sum(1) - held.sum(1)).clamp(min=0)

    def error(self) -> Tensor:
        """(B,) float64 in [0, 1]: the share of the scatter that the clusters leave unexplained."""
        scatter = self.scatter()
        return torch.where(scatter > 0, self.loss() / scatter.clamp(min=1e-9), 0.0).clamp(max=1)

    def mapped(self, maps: Tensor, clusters: int) -> Clusters:
        """The clusters joined or renumbered by (B, K) `maps` to slots below `clusters`."""
        maps = maps.where(self.live, 0)
        real = self.labels >= 0
        # Where no row has a token there is no slot to look up either.
        labels = maps.gather(1, self.labels.clamp(min=0)).where(real, -1) if maps.shape[1] else self.labels
        counts = self.counts.new_zeros(len(maps), clusters).scatter_add(1, maps, self.counts)
        indices = maps[..., None].expand_as(self.sums)
        sums = self.sums.new_zeros(len(maps), clusters, self.sums.shape[2]).scatter_add(1, indices, self.sums)
        return Clusters(labels, sums, counts)


def cluster(
    tokens: Tensor,
    clusters: int | Sequence[int],
    *,
    mask: Tensor | None = None,
    grids: Sequence[Grid] | None = None,
    generator: torch.Generator | None = None,
    max_iterations: int = ITERATIONS,
) -> Clusters:
    """Clusters the tokens of every clip, numbered by mean time and raster.

    Args:
        tokens: (B, N, D) of any floating-point dtype.
        clusters: How many, for all clips or for each; a clip of fewer tokens has as many as it has tokens.
        mask: (B, N) bool, True where a token is real, on either side of padding; all of them if not given.
        grids: (T, H, W) of every clip, which its tokens fill in raster order; one token a frame if not given.
        generator: On the CPU. Seeds the clusters by k-means++ instead, at random.
        max_iterations: At most so many passes over the tokens.

    Raises:
        ValueError: A real token is NaN or infinite, `clusters` is below 1, or a grid does not fit.
    """
    unit, mask = unit_tokens(tokens, mask)
    layout = layout_of(mask, grids)
    num_clusters = torch.as_tensor(clusters, device=unit.device).expand(len(unit)).minimum(mask.sum(1))
    if bool(((num_clusters < 1) & mask.any(1)).any()):
        raise ValueError(f"a clip has at least 1 cluster, not {clusters}")
    return number(find(unit, mask, num_clusters, generator, max_iterations), layout)


def number(clusters: Clusters, layout: Layout) -> Clusters:
    """Numbers clusters by the cell in their middle: mean time in whole frames, then raster, then first token."""
    slots = clusters.counts.shape[1]
    first = first_tokens(clusters.labels, slots)
    cells = central_cells(clusters.labels, layout, slots).where(clusters.live, int(layout.sides.prod(1).max()))
    return clusters.mapped(ranks([cells, first]), slots)


@torch.no_grad()
def unit_tokens(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens divided by their length, on a grid of 2^-26: (B, N, D) float32, zero in padding; and the mask.

    A token of length zero, or below 1e-30, has no direction; the diagonal stands for it, so that such tokens are alike.

    Raises:
        ValueError: A real token is NaN or infinite.
    """
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    x = tokens.float()
    if not bool(mask.all()):
        x = x.masked_fill(~mask[..., None], 0.0)
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    if broken := (~length.isfinite()).any(1).nonzero().flatten().tolist():
        raise ValueError(f"real tokens of items {broken} are NaN or infinite; mask them or correct the encoder")
    long = length >= _SHORTEST
    unit = x * (_GRID / length).where(long, 0.0).float()[..., None]
    if bool((directionless := mask & ~long).any()):
        unit = unit.masked_fill(directionless[..., None], _GRID / math.sqrt(max(unit.shape[2], 1)))
    return unit.round_().mul_(1 / _GRID), mask


@torch.no_grad()
def find(
    unit: Tensor,
    mask: Tensor,
    num_clusters: Tensor,
    generator: torch.Generator | None = None,
    max_iterations: int = ITERATIONS,
) -> Clusters:
    """`cluster` for unit tokens, in no particular order.

    Args:
        unit: (B, N, D) float32 as from `unit_tokens`.
        mask: (B, N) bool.
        num_clusters: (B,) int64, at most the tokens of each clip.
        generator: On the CPU; for k-means++.
        max_iterations: At most so many passes over the tokens.
    """
    if not num_clusters.numel() or int(num_clusters.max()) == 0:
        empty = unit.new_zeros(len(unit), 0, unit.shape[2], dtype=torch.float64)
        return Clusters(-torch.ones_like(mask, dtype=torch.long), empty, mask.new_zeros(len(unit), 0, dtype=torch.long))
    if generator is None:
        # An even sample is cheap to seed and to improve; all tokens then need few passes.
        few, few_mask = _even_sample(unit, mask, (4 * num_clusters).clamp(min=_SAMPLE))
        start = lloyd(few, few_mask, _start(few, few_mask, num_clusters), max_iterations).sums
    else:
        start = _gather(unit, seeds(unit, mask, num_clusters, generator)) * _first(num_clusters)
    return fill_empty(unit, lloyd(unit, mask, start, max_iterations), num_clusters)


def _even_sample(unit: Tensor, mask: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """At most (B,) `sample` tokens of every clip, evenly spaced among its real ones."""
    sizes = mask.sum(1)
    kept = sizes.minimum(sample)
    rank = torch.arange(int(kept.max()), device=unit.device)
    real = rank < kept[:, None]
    taken = (rank * sizes[:, None] // kept[:, None].clamp(min=1)).where(real, 0)
    if bool(mask.all()) and int(kept.min()) == mask.shape[1]:
        return unit, mask
    indices = (~mask).long().argsort(dim=1, stable=True).gather(1, taken)
    return unit.gather(1, indices[..., None].expand(-1, -1, unit.shape[2])) * real[..., None], real


def _start(unit: Tensor, mask: Tensor, num_clusters: Tensor) -> Tensor:
    """(B, K, D) float64 centers to start from: seeds, or twice as many merged; zero beyond `num_clusters`."""
    most = int(num_clusters.max())
    start = unit.new_zeros(len(unit), most, unit.shape[2], dtype=torch.float64)
    many = num_clusters > _MOST_MERGED
    for item in many.nonzero().flatten().tolist():
        part = slice(item, item + 1)
        start[part] = _gather(unit[part], seeds(unit[part], mask[part], num_clusters[part])) * _first(
            num_clusters[part], most
        )
    if bool(many.all()):
        return start
    unit, mask, few = unit[~many], mask[~many], num_clusters[~many]
    doubled = (2 * few).minimum(mask.sum(1))
    found = lloyd(unit, mask, _gather(unit, seeds(unit, mask, doubled)) * _first(doubled), 1)
    tree = merge_all(found.sums, found.counts, _first(doubled, found.sums.shape[1])[..., 0])
    start[~many] = found.mapped(tree.at(few), most).sums
    return start


@torch.no_grad()
def seeds(unit: Tensor, mask: Tensor, num_clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices of tokens to start from: (B, most) int64, distinct while distinct tokens are left.

    Without a generator the first is the token most like the mean, and each further round doubles their number: where
    the squared distance to the nearest seed, accumulated over the clip, passes even shares of its sum. With one, it is
    k-means++: a uniform draw, then draws by squared distance, one by one.

    Args:
        unit: (B, N, D) float32 as from `unit_tokens`.
        mask: (B, N) bool.
        num_clusters: (B,) int64, at most the tokens of each clip; what stands beyond them means nothing.
        generator: On the CPU.
    """
    exact, most = unit.double(), int(num_clusters.max())
    if generator is None:
        draws = None
        likeness = similarities(exact, exact.sum(1, keepdim=True))[..., 0]
        found = likeness.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    else:
        draws = torch.rand(len(unit), most, generator=generator, dtype=torch.float64).to(unit.device)
        found = _draw(mask.double(), draws[:, :1])
    distance, new = mask.double() * 4, found
    while (have := found.shape[1]) < most:
        near = 2 - 2 * similarities(exact, _gather(unit, new)).amax(2)
        distance = distance.minimum(near.where(near > 1e-12, 0.0)).scatter(1, found, 0.0)
        if draws is None:
            more = (num_clusters[:, None] - have).clamp(1, have)
            shares = (torch.arange(min(have, most - have), device=unit.device) + 0.5) / more
        else:
            shares = draws[:, have : have + 1]
        left = distance.sum(1, keepdim=True) > 0
        untaken = mask.double().scatter(1, found, 0.0)
        new = _draw(distance.where(left, untaken), shares.double())
        found = torch.cat([found, new], 1)
    return found


def _draw(weights: Tensor, shares: Tensor) -> Tensor:
    """(B, m) indices where the accumulated (B, N) weights pass (B, m) shares of their sum."""
    reached = weights.cumsum(1)
    return torch.searchsorted(reached, shares * reached[:, -1:], right=True).clamp(max=weights.shape[1] - 1)


def nearest(unit: Tensor, centers: Tensor, live: Tensor) -> Tensor:
    """Most similar live center of every token: (B, N) int64; ties go to the lowest.

    Args:
        unit: (B, N, D) float32 as from `unit_tokens`.
        centers: (B, K, D) float64 unit vectors.
        live: (B, K) bool.
    """
    block = max(1, _BLOCK // max(1, centers.shape[0] * centers.shape[1]))
    return torch.cat([_nearest(part, centers, live) for part in unit.split(block, 1)], 1)


def _nearest(unit: Tensor, centers: Tensor, live: Tensor) -> Tensor:
    dead = ~live[:, None]
    if unit.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        return similarities(unit.double(), centers).masked_fill_(dead, -torch.inf).argmax(2)
    with torch.autocast("cpu", enabled=False):
        rough = (unit @ centers.float().transpose(1, 2)).masked_fill_(dead, -torch.inf)
    best, labels = rough.max(2)
    unclear = (rough >= best[..., None] - _NEAR_TIE).sum(2) > 1
    for item in unclear.any(1).nonzero().flatten().tolist():
        again = similarities(unit[item, unclear[item]].double(), centers[item])
        labels[item, unclear[item]] = again.masked_fill_(~live[item], -torch.inf).argmax(1)
    return labels


def similarities(exact: Tensor, centers: Tensor) -> Tensor:
    """Inner products in float64, where those that differ by rounding only are equal."""
    return (exact @ centers.transpose(-1, -2)).mul_(_TIE).round_().mul_(1 / _TIE)


@torch.no_grad()
def lloyd(
    unit: Tensor, mask: Tensor, centers: Tensor, max_iterations: int = ITERATIONS, settled: float = SETTLED
) -> Clusters:
    """Assigns tokens and moves centers until few tokens change.

    Args:
        unit: (B, N, D) float32 as from `unit_tokens`.
        mask: (B, N) bool.
        centers: (B, K, D) float64 of any length, where zero means that there is none.
        max_iterations: At most so many assignments, at least one.
        settled: Share of the tokens that may still change when a clip is done.
    """
    live = centers.any(2)
    centers = unit_rows(centers)
    sums, counts = torch.zeros_like(centers), mask.new_zeros(centers.shape[:2], dtype=torch.long)
    labels = mask.long() - 2  # -1 is "not yet" here and -2 padding
    enough = (settled * mask.sum(1)).floor()
    running = torch.ones_like(enough, dtype=torch.bool)
    for _ in range(max(max_iterations, 1)):
        new = nearest(unit, centers, live).where(mask & running[:, None], labels)
        moved = new != labels
        _move(unit, moved, labels, new, sums, counts)
        labels = new
        running &= moved.sum(1) > enough
        if not bool(running.any()):
            break
        centers = torch.where(counts[..., None] > 0, unit_rows(sums), centers)
    return Clusters(labels.clamp(min=-1), sums, counts)


def _move(unit: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Takes the tokens that changed cluster out of the old sums and into the new ones, in place."""
    slots = sums.shape[1]
    flat, numbers = sums.view(-1, sums.shape[2]), counts.view(-1)
    items, indices = moved.nonzero(as_tuple=True)
    for item, index in zip(items.split(4096), indices.split(4096), strict=True):
        rows = unit[item, index].double()
        came = item * slots + new[item, index]
        flat.index_add_(0, came, rows)
        numbers.index_add_(0, came, torch.ones_like(came))
        had = old[item, index] >= 0
        left = (item * slots + old[item, index])[had]
        flat.index_add_(0, left, -rows[had])
        numbers.index_add_(0, left, -torch.ones_like(left))


def fill_empty(unit: Tensor, found: Clusters, num_clusters: Tensor) -> Clusters:
    """Gives tokens to every empty cluster among the first `num_clusters`, one by one since they are rare."""
    slots = found.counts.shape[1]
    for item, empty in (~found.live & _first(num_clusters, slots)[..., 0]).nonzero().tolist():
        counts, sums, labels = found.counts[item], found.sums[item], found.labels[item]
        loss = counts - sums.square().sum(1) / counts.clamp(min=1)
        loss = loss.where(loss > 1e-6 * counts, counts * 1e-9).masked_fill(counts < 2, -1.0)
        donor = int(loss.argmax())
        members = (labels == donor).nonzero().flatten()
        distance = 1 - similarities(unit[item, members].double(), unit_rows(sums[donor])[None])[:, 0]
        far = members[distance.argmax()][None] if bool(distance.max() > 1e-6) else members[len(members) // 2 :]
        moved = torch.zeros_like(found.labels, dtype=torch.bool)
        moved[item, far] = True
        new = found.labels.masked_fill(moved, empty)
        _move(unit, moved, found.labels, new, found.sums, found.counts)
        found = Clusters(new, found.sums, found.counts)
    return found


def unit_rows(vectors: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero."""
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt().clamp(min=math.ulp(1.0))


def _gather(unit: Tensor, indices: Tensor) -> Tensor:
    """(B, m, D) float64 tokens at (B, m) indices."""
    return unit.gather(1, indices[..., None].expand(-1, -1, unit.shape[2])).double()


def _first(count: Tensor, slots: int | None = None) -> Tensor:
    """(B, slots, 1) bool: the first `count` slots of every item."""
    slots = int(count.max()) if slots is None else slots
    return (torch.arange(slots, device=count.device) < count[:, None])[..., None]
