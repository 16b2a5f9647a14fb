"""VQToken as a model and as a token reducer: a whole clip in K tokens.

    with attach(model, VQToken(), 32) as handle: ...                               # needs no weights
    VQToken().reduce(tokens, "32,e0.2")                                            # fewer where 20 % error allow it
    VQToken.from_pretrained("model_cards/vqtoken-tiny").compress(tokens, "25%")    # tokens, index maps and sizes

Source: VQToken (arXiv 2503.16980). k-means clusters all patches of a clip (`clustering.py`), the codes are the means of
the clusters (`codebook.py`), the token hash is the map of cluster numbers over (T, H, W) (`token_hash.py`), and
VQ-attention mixes the two (`attention.py`). Differs from the published code: the count of tokens is the budget's (there
it is the larger of frames and K), order and positions of the codes follow time, and every clip of a batch has its own
count. A clip may have one frame.

VQToken reduces videos. Attached to a language model it leaves pictures whole, as published, and `attach` warns when a
call holds pictures only; `attach(..., modalities=("image", "video"))` reduces both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenthrift.budget import (
    BudgetError,
    BudgetLike,
    BudgetSupport,
    ItemSize,
    NativeCost,
    SizeLike,
    TokenBudget,
    TokenUsage,
    budgets_for,
    sizes_of,
)
from tokenthrift.hub import HubModel
from tokenthrift.padding import gather_rows, pad_rows
from tokenthrift.reducers.base import Item, check_finite, pad_items, unpad
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import adaptive, released
from tokenthrift.vqtoken.attention import ReleasedVQAttention, VQAttention
from tokenthrift.vqtoken.clustering import Clusters, find, number, unit_tokens
from tokenthrift.vqtoken.codebook import means, medoids
from tokenthrift.vqtoken.config import VQTokenConfig, upgrade_vqtoken_config
from tokenthrift.vqtoken.token_hash import Grid, central_cells, describe, increasing, layout_of, ranks, with_time

__all__ = ["Compressed", "VQToken"]

Coded = tuple[Item, Tensor, float | None]
"""The codes of one clip, its index map, and its error where one is computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A batch of clips in few tokens.

    Attributes:
        tokens: The codes of every clip, in order of time; a newline after the frames stays behind them.
        maps: (T, H, W) int64 of every clip: the index of the code that stands for a cell, -1 where none is left.
    """

    tokens: TokenBatch
    maps: tuple[Tensor, ...]


class VQToken(HubModel):
    """Clusters of a clip as tokens; a `TokenReducer`. It is in evaluation mode until `train()` is called.

    With `selection_method` "fixed" and a budget without target error, a clip has exactly as many tokens as its budget
    allows. Otherwise the plan is a bound.

    Args:
        config: The default needs no weights.
    """

    system: ClassVar[str] = "vqtoken"
    config_class: ClassVar[type] = VQTokenConfig
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    """What `attach` reduces if its caller names nothing else; pictures stay whole."""
    config: VQTokenConfig

    def __init__(self, config: VQTokenConfig | None = None) -> None:
        super().__init__(config or VQTokenConfig())
        c = self.config.attention
        self.cross_attention: nn.Module | None = None  # the name it has in published checkpoints
        if c is not None:
            sizes = (c.hidden_size, c.num_attention_heads, c.intermediate_size)
            corrected = self.config.compat == "corrected"
            self.cross_attention = VQAttention(*sizes) if corrected else ReleasedVQAttention(*sizes, c.num_patches)
        self.eval()

    @classmethod
    def upgrade_config(cls, fields: Mapping[str, Any], version: int) -> dict[str, Any]:
        """See `HubModel.upgrade_config`."""
        return upgrade_vqtoken_config(fields)

    @property
    def support(self) -> BudgetSupport:
        """Which budgets the model honors."""
        rule = {"target_error"} if self.config.selection_method == "fixed" and self._corrected else set()
        return BudgetSupport(
            fields=frozenset({"max_tokens", "retention", "tokens_per_second"} | rule),
            adaptive=self.config.selection_method != "fixed" or bool(rule),
            training_free=self.config.attention is None,
        )

    @property
    def native_cost(self) -> NativeCost:
        """Unknown: the encoder in front of the model decides how many tokens a frame has."""
        return NativeCost()

    @property
    def _corrected(self) -> bool:
        return self.config.compat == "corrected"

    @property
    def _averages(self) -> bool:
        """Whether a code is made of its cluster: a medoid is one token, the published attention mixes clusters."""
        return self.config.code_type == "mean" and (self._corrected or self.cross_attention is None)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`: the exact count, or a bound where content decides.

        Args:
            items: Their native tokens, or frames, height and width of the grid of their tokens.
            budget: Ceilings for each clip, or a list with one budget for each.

        Raises:
            BudgetError: The budget cannot be honored, or has fewer tokens than frames for the published attention.
        """
        sizes = [item if item.native is not None else replace(item, native=_cells(item)) for item in sizes_of(items)]
        budgets = budgets_for(budget, len(sizes))
        usage = []
        for item, limit, planned in zip(sizes, budgets, self.support.plan(sizes, budgets), strict=True):
            cap = planned.cap
            if self._selects(planned.native, cap, limit):
                cap = min(cap, max(self.config.max_clusters, limit.min_tokens))
            self._check_frames(item, planned.native, cap)
            usage.append(replace(planned, cap=cap, used=cap))
        return tuple(usage)

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`."""
        return self.compress(tokens, budget).tokens

    def forward(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """The same; a gradient reaches the tokens through the means."""
        return self.reduce(tokens, budget)

    def compress(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> Compressed:
        """Reduces clips and returns the index map of each beside its codes.

        Args:
            tokens: Native tokens, padded on either side; `grids` holds frames, rows and columns. Without it every
                token is a frame.
            budget: Ceilings for each clip, or a list with one budget for each. A ceiling at or above native returns
                the tokens bit for bit.

        Raises:
            BudgetError: The budget cannot be honored, or has fewer tokens than frames for the published attention.
            ValueError: A real token is not finite, or a grid has more cells than its clip has tokens.
        """
        usage = list(self.plan(tokens.item_sizes(), budget))
        budgets = budgets_for(budget, len(usage))
        check_finite(tokens)
        grids = [(u.native, 1, 1) for u in usage] if tokens.grids is None else list(tokens.grids)
        items = [item._replace(codes=None) for item in unpad(tokens)]
        maps = [torch.arange(t * h * w, device=tokens.mask.device).view(t, h, w) for t, h, w in grids]
        # Clips whose number of codes depends on their content are clustered apart, so that no row touches another.
        groups: dict[bool, list[int]] = {False: [], True: []}
        for i, (use, limit) in enumerate(zip(usage, budgets, strict=True)):
            if use.cap == 0 and use.native:
                items[i], maps[i] = items[i].select(items[i].positions[:0]), maps[i].fill_(-1)
            elif (selects := self._selects(use.native, use.cap, limit) and use.native > 0) or use.cap < use.native:
                groups[selects].append(i)
        if all(use.cap == use.native for use in usage) and not groups[True]:
            return Compressed(replace(tokens, usage=tuple(usage)), tuple(maps))
        for selects, rows in groups.items():
            if not rows:
                continue
            chosen = [budgets[i] if selects else None for i in rows]
            done = self._shrink(
                [items[i] for i in rows], [grids[i] for i in rows], [usage[i].cap for i in rows], chosen
            )
            for i, (item, index_map, error) in zip(rows, done, strict=True):
                items[i], maps[i] = item, index_map
                usage[i] = replace(usage[i], used=len(item.positions), error=error)
        return Compressed(pad_items(items, tokens.seconds, tuple(usage)), tuple(maps))

    def _selects(self, native: int, cap: int, budget: TokenBudget) -> bool:
        """Whether content decides how many codes a clip gets. A rule never touches a clip that may stay whole."""
        return budget.target_error is not None or (self.config.selection_method != "fixed" and cap < native)

    def _check_frames(self, item: ItemSize, native: int, cap: int) -> None:
        """Raises a BudgetError where the published attention would make more tokens than the cap."""
        if self.cross_attention is None or self._corrected or not 0 < cap < native:
            return
        if item.frames is None or item.height is None or item.width is None:
            return
        rest = min(max(native - _cells(item), 0), cap - 1)
        if item.frames > cap - rest:
            raise BudgetError(
                f"{cap} tokens for {item.frames} frames",
                "with the published attention at least one token a frame, and those after the frames; compat "
                "'corrected' has no such limit",
                item.frames + rest,
            )

    def _shrink(
        self, items: Sequence[Item], grids: Sequence[Grid], caps: Sequence[int], budgets: Sequence[TokenBudget | None]
    ) -> list[Coded]:
        """Clips of at least one token each, coded; a budget is given where content decides."""
        self._check(items, grids)
        cells = [t * h * w for t, h, w in grids]
        # What follows the frames (a newline) stays where the budget has room for it and a code.
        rests = [min(len(i.positions) - n, cap - 1) for i, n, cap in zip(items, cells, caps, strict=True)]
        clips = [i.select(torch.arange(n, device=i.positions.device)) for i, n in zip(items, cells, strict=True)]
        counts = [cap - rest for cap, rest in zip(caps, rests, strict=True)]
        if self._corrected:
            done = self._code(clips, grids, counts, budgets)
        else:
            done = [self._code_as_published(clip, grid, k) for clip, grid, k in zip(clips, grids, counts, strict=True)]
        out = []
        for (code, index_map, error), item, n, rest in zip(done, items, cells, rests, strict=True):
            tail = item.select(torch.arange(n, n + rest, device=item.positions.device))
            group = torch.full_like(item.positions, -1)
            group[:n], group[n : n + rest] = index_map.flatten(), torch.arange(rest, device=group.device) + len(code[0])
            joined = item.merged(
                torch.cat([code.embeddings, tail.embeddings]),
                torch.cat([code.positions, tail.positions]),
                torch.cat([code.weights(), tail.weights()]),
                group,
            )
            if not self._averages:
                joined = joined._replace(sources=None)
            out.append((joined, index_map, error))
        return out

    def _code(
        self,
        clips: Sequence[Item],
        grids: Sequence[Grid],
        counts: Sequence[int],
        budgets: Sequence[TokenBudget | None],
    ) -> list[Coded]:
        """All clips as one batch, by the corrected rules."""
        x, mask = pad_rows([clip.embeddings for clip in clips])
        weights, _ = pad_rows([clip.weights() for clip in clips])
        layout, sizes = layout_of(mask, grids), mask.sum(1)
        unit, _ = unit_tokens(x, mask)
        if self.config.time_share:
            unit = with_time(unit, mask, layout, self.config.time_share)
        most = torch.tensor(counts, device=x.device)
        # At least one code is k-means'.
        ordinary = most - (most * self.config.outlier_share).floor().long().clamp(max=most - 1)
        clusters = find(unit, mask, ordinary, max_iterations=self.config.max_iterations)
        if self.config.outlier_share:
            clusters = adaptive.with_outliers(unit, mask, clusters, most)
        limits = [budget for budget in budgets if budget is not None]
        if limits:
            clusters = self._select(unit, mask, clusters, limits)
        slots = clusters.counts.shape[1]
        if self.config.code_type == "medoid":
            index = medoids(unit, clusters)
            order = ranks([index.where(clusters.live, x.shape[1])])
            clusters, index = clusters.mapped(order, slots), index.gather(1, order.argsort(1))
            codes = gather_rows(x, index).float()
            mass = means(x[..., :0], clusters.labels, slots, weights)[1]
        else:
            clusters = number(clusters, layout)
            index = increasing(central_cells(clusters.labels, layout, slots), sizes, clusters.live.sum(1))
            codes, mass = means(x, clusters.labels, slots, weights)
        if self.cross_attention is not None:
            codes = self.cross_attention(codes, describe(clusters.labels, layout, slots), clusters.live)
        errors = clusters.error().tolist() if limits else [None] * len(clips)
        done = []
        for i, k in enumerate(clusters.live.sum(1).tolist()):
            code = Item(codes[i, :k].to(x.dtype), clips[i].positions[index[i, :k]], None, mass[i, :k])
            done.append((code, clusters.labels[i][mask[i]].view(grids[i]), errors[i]))
        return done

    def _select(self, unit: Tensor, mask: Tensor, clusters: Clusters, budgets: Sequence[TokenBudget]) -> Clusters:
        """Fewer clusters where the content needs no more."""
        config, most = self.config, clusters.live.sum(1)
        floors = torch.tensor([max(budget.min_tokens, 1) for budget in budgets], device=most.device).minimum(most)
        tree = adaptive.tree_of(clusters)
        if config.selection_method == "fixed":
            targets = most.new_tensor([budget.target_error or 0.0 for budget in budgets], dtype=torch.float64)
            found = adaptive.by_error(adaptive.errors(clusters, tree), targets, floors, most)
        else:
            floors = floors.clamp(min=config.min_clusters).minimum(most)
            if config.selection_method == "gain":
                curve = adaptive.errors(clusters, tree)
                found = adaptive.by_gain(curve, config.min_gain, floors, most)
            elif config.selection_method == "elbow":
                found = adaptive.by_elbow(adaptive.errors(clusters, tree), floors, most)
            else:
                found = adaptive.by_silhouette(adaptive.silhouettes(unit, clusters, tree), floors, most)
        return adaptive.merged(unit, mask, clusters, tree, found)

    def _code_as_published(self, clip: Item, grid: Grid, count: int) -> Coded:
        """One clip by the published rules. Its codes have no order in time, so their positions are spread evenly."""
        tokens, compat = clip.embeddings, self.config.compat
        with torch.no_grad():
            labels, centers, _ = self._published_fit(tokens.detach(), count)
            if self.cross_attention is None and compat == "released":
                labels, order = released.first_occurrence(labels, len(centers))
                centers = centers[order]
        if compat == "released":
            codes = released.code_means_2026(tokens, labels, centers)
        else:
            codes = released.code_means_2025(tokens, labels, len(centers))
        mass = means(tokens[None, :, :0], labels[None], len(codes), clip.weights()[None])[1][0]
        if self.cross_attention is not None:
            codes = self.cross_attention(labels.view(grid[0], -1), codes)
            # Which tokens a row stands for is lost in the attention; all stand for an equal part of the clip.
            mass = clip.weights().sum().expand(len(codes)) / len(codes)
        index = torch.arange(len(codes), device=labels.device) * len(labels) // len(codes)
        return Item(codes.to(tokens.dtype), clip.positions[index], None, mass), labels.view(grid), None

    def _published_fit(self, tokens: Tensor, count: int) -> released.Fit:
        """The clustering of one clip by the rules of either era, into `count` clusters or at most as many."""
        config, least = self.config, min(self.config.min_clusters, count)
        if config.compat == "released_2025":
            generator = torch.Generator(tokens.device).manual_seed(config.seed)
            if config.selection_method == "fixed":
                return released.fit_2025(tokens, count, generator, config.max_iterations)
            return released.search_2025(tokens, least, count, config.selection_method, generator)
        if config.selection_method == "fixed":
            return released.fit_2026(tokens, count, config.seed, config.max_iterations)
        return released.search_2026(tokens, least, count, config.selection_method, config.seed)

    def _check(self, items: Sequence[Item], grids: Sequence[Grid]) -> None:
        """Raises a ValueError where a grid, or the width that the attention reads, does not fit."""
        sizes = self.config.attention
        for item, grid in zip(items, grids, strict=True):
            (frames, height, width), native = grid, len(item.positions)
            if not 0 < frames * height * width <= native:
                raise ValueError(f"a grid of {frames} x {height} x {width} cells for {native} tokens")
            if sizes is not None and item.embeddings.shape[1] != sizes.hidden_size:
                raise ValueError(f"tokens are {item.embeddings.shape[1]} wide, the attention reads {sizes.hidden_size}")
            if sizes is not None and not self._corrected and height * width != sizes.num_patches:
                raise ValueError(
                    f"a grid has {height} x {width} cells a frame, the published attention reads {sizes.num_patches}"
                )


def _cells(item: ItemSize) -> int:
    return int(item.require("frames") * item.require("height") * item.require("width"))
