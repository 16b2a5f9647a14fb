"""VQToken as a model and as a token reducer: a whole clip in K tokens.

    with attach(model, VQToken(), TokenBudget(max_tokens=32)) as handle: ...       # no weights needed
    VQToken().reduce(tokens, TokenBudget.parse("32,e0.2"))                         # fewer where 20 % error allow it
    VQToken.from_pretrained("model_cards/vqtoken-tiny").compress(tokens, budget)   # tokens, index maps, codes

Source: VQToken (arXiv 2503.16980). All patches of a clip are clustered (`clustering.py`), the codes are the means of
the clusters (`codebook.py`), the token hash is the map of cluster numbers over (T, H, W) (`token_hash.py`), and
VQ-attention mixes the two (`attention.py`). Differs from the published code: the budget is met exactly (there the count
is the larger of frames and K), order and positions of the codes follow time, items of a batch have counts of their own,
and a clip of one frame is a clip like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetError, BudgetSupport, TokenBudget, TokenUsage
from tokenthrift.hub import HubModel
from tokenthrift.reducers.base import Item, check_finite, pad_items, unpad
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import adaptive, released
from tokenthrift.vqtoken.attention import ReleasedVQAttention, VQAttention
from tokenthrift.vqtoken.clustering import Clusters, find, number, unit_tokens
from tokenthrift.vqtoken.codebook import means, medoids
from tokenthrift.vqtoken.config import VQTokenConfig
from tokenthrift.vqtoken.token_hash import Grid, central_cells, increasing, layout_of, ranks
from tokenthrift.vqtoken.token_hash import describe

__all__ = ["Compressed", "VQToken"]


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """A batch of clips in few tokens.

    Attributes:
        tokens: The codes of every clip, in order of time; a newline after the frames stays behind them.
        maps: (T, H, W) int64 of every clip: which of its codes stands for a cell.
    """

    tokens: TokenBatch
    maps: tuple[Tensor, ...]


class VQToken(HubModel):
    """Clusters of a clip as tokens; a `TokenReducer`.

    Without a target error, and with `choose` "fixed", a clip has exactly as many tokens as its budget allows; otherwise
    the plan is a bound.

    Args:
        config: The default needs no weights.
    """

    system: ClassVar[str] = "vqtoken"
    config_class: ClassVar[type] = VQTokenConfig
    modalities: ClassVar[tuple[str, ...]] = ("video",)
    """What `attach` reduces unless told otherwise: pictures stay as they are."""
    config: VQTokenConfig

    def __init__(self, config: VQTokenConfig | None = None) -> None:
        super().__init__(config or VQTokenConfig())
        sizes = self.config.attention
        self.cross_attention: nn.Module | None = None  # the name it has in published checkpoints
        if sizes is not None and self.config.compat != "corrected":
            self.cross_attention = ReleasedVQAttention(sizes.width, sizes.heads, sizes.ffn, sizes.patches)
        elif sizes is not None:
            self.cross_attention = VQAttention(sizes.width, sizes.heads, sizes.ffn)

    @property
    def support(self) -> BudgetSupport:
        """What the model can honor."""
        rule = {"target_error"} if self.config.choose == "fixed" and self.config.compat == "corrected" else set()
        return BudgetSupport(
            fields=frozenset({"max_tokens", "retention", "tokens_per_second"} | rule),
            adaptive=self.config.choose != "fixed" or bool(rule),
            training_free=self.config.attention is None,
        )

    def plan(
        self, native: Sequence[int], budget: TokenBudget, seconds: Sequence[float] | None = None
    ) -> tuple[int, ...]:
        """See `TokenReducer.plan`: the exact count, or a bound where content decides."""
        caps = self.support.caps(native, budget, seconds)
        return tuple(
            min(cap, max(self.config.most, budget.min_tokens)) if self._chooses(n, cap, budget) else cap
            for n, cap in zip(native, caps, strict=True)
        )

    def reduce(self, tokens: TokenBatch, budget: TokenBudget) -> TokenBatch:
        """See `TokenReducer.reduce`."""
        return self.compress(tokens, budget).tokens

    def forward(self, tokens: TokenBatch, budget: TokenBudget) -> TokenBatch:
        """The same; a gradient reaches the tokens through the means."""
        return self.reduce(tokens, budget)

    def compress(self, tokens: TokenBatch, budget: TokenBudget) -> Compressed:
        """Reduces clips and tells what became of every cell.

        Args:
            tokens: Native tokens, padded on either side; `grids` tells frames, rows and columns. Without it a token is
                a frame.
            budget: Ceilings for each clip. One at or above native returns the tokens bit for bit.

        Raises:
            BudgetError: The budget cannot be honored, or has fewer tokens than frames for the published attention.
            ValueError: A real token is not finite, or a grid has more cells than its clip has tokens.
        """
        native = tokens.mask.sum(1).tolist()
        caps = self.plan(native, budget, tokens.seconds)
        check_finite(tokens)
        grids = [(n, 1, 1) for n in native] if tokens.grids is None else list(tokens.grids)
        items = [item._replace(codes=None) for item in unpad(tokens)]
        usage = [TokenUsage(native=n, cap=cap, used=cap) for n, cap in zip(native, caps, strict=True)]
        maps = [_identity(grid, tokens.mask.device) for grid in grids]
        rows = [
            i for i, (n, cap) in enumerate(zip(native, caps, strict=True)) if cap < n or self._chooses(n, cap, budget)
        ]
        if not rows:
            return Compressed(replace(tokens, usage=tuple(usage)), tuple(maps))
        for i in [i for i in rows if caps[i] == 0]:
            items[i], maps[i] = items[i].select(items[i].positions[:0]), maps[i].fill_(-1)
            rows.remove(i)
        if rows:
            done = self._shrink([items[i] for i in rows], [grids[i] for i in rows], [caps[i] for i in rows], budget)
            for i, (item, index_map, error) in zip(rows, done, strict=True):
                items[i], maps[i] = item, index_map
                usage[i] = replace(usage[i], used=len(item.positions), error=error)
        return Compressed(pad_items(items, tokens.seconds, tuple(usage)), tuple(maps))

    def check_frames(self, grid: Grid, native: int, cap: int) -> None:
        """Checks that a clip of so many frames may be reduced to a cap; anything may, but for the published attention.

        Args:
            grid: Frames, rows and columns of its tokens.
            native: Its tokens, with a newline after the frames if there is one.
            cap: As `plan` gives it.

        Raises:
            BudgetError: The published attention would make more tokens.
        """
        if self.cross_attention is None or self.config.compat == "corrected" or not 0 < cap < native:
            return
        frames, height, width = grid
        rest = min(native - frames * height * width, cap - 1)
        if frames > cap - rest:
            raise BudgetError(
                f"{cap} tokens for {frames} frames",
                "with the published attention at least one token a frame, and those after the frames; compat "
                "'corrected' has no such limit",
                frames + rest,
            )

    def _chooses(self, native: int, cap: int, budget: TokenBudget) -> bool:
        """Whether content decides how many codes a clip gets. A rule never touches a clip that may stay whole."""
        return budget.target_error is not None or (self.config.choose != "fixed" and cap < native)

    def _shrink(
        self, items: Sequence[Item], grids: Sequence[Grid], caps: Sequence[int], budget: TokenBudget
    ) -> list[tuple[Item, Tensor, float | None]]:
        """Clips of at least one token each: what is left of them, their index maps, and the error where one counts."""
        self._check(items, grids)
        for item, grid, cap in zip(items, grids, caps, strict=True):
            self.check_frames(grid, len(item.positions), cap)
        cells = [t * h * w for t, h, w in grids]
        # What follows the frames (a newline) stays where the budget has room for it and a code.
        rests = [min(len(i.positions) - n, cap - 1) for i, n, cap in zip(items, cells, caps, strict=True)]
        clips = [i.select(torch.arange(n, device=i.positions.device)) for i, n in zip(items, cells, strict=True)]
        wanted = [cap - rest for cap, rest in zip(caps, rests, strict=True)]
        if self.config.compat != "corrected":
            done = [self._released(clip, grid, k) for clip, grid, k in zip(clips, grids, wanted, strict=True)]
        else:
            done = self._corrected(clips, grids, wanted, budget)
        out = []
        for (code, index_map, error), item, n, rest in zip(done, items, cells, rests, strict=True):
            tail = item.select(torch.arange(n, n + rest, device=item.positions.device))
            joined = Item(
                torch.cat([code.embeddings, tail.embeddings]),
                torch.cat([code.positions, tail.positions]),
                None,
                torch.cat([code.weights(), tail.weights()]),
            )
            out.append((joined, index_map, error))
        return out

    def _corrected(
        self, clips: Sequence[Item], grids: Sequence[Grid], wanted: Sequence[int], budget: TokenBudget
    ) -> list[tuple[Item, Tensor, float | None]]:
        """All clips as one batch: codes, index maps, and the errors where content decides."""
        x = pad_sequence([clip.embeddings for clip in clips], batch_first=True)
        weights = pad_sequence([clip.weights() for clip in clips], batch_first=True)
        sizes = torch.tensor([len(clip.positions) for clip in clips], device=x.device)
        mask = torch.arange(x.shape[1], device=x.device) < sizes[:, None]
        layout = layout_of(mask, grids)
        unit, _ = unit_tokens(x, mask)
        clusters = find(unit, mask, torch.tensor(wanted, device=x.device), iterations=self.config.iterations)
        chosen = self.config.choose != "fixed" or budget.target_error is not None
        if chosen:
            clusters = self._choose(unit, mask, clusters, budget)
        slots = clusters.counts.shape[1]
        if self.config.codes == "medoid":
            place = medoids(unit, clusters)
            order = ranks([place.where(clusters.live, x.shape[1])])
            clusters, place = clusters.mapped(order, slots), place.gather(1, order.argsort(1))
            codes = x.gather(1, place[..., None].expand(-1, -1, x.shape[2])).float()
            mass = means(x[..., :0], clusters.labels, slots, weights)[1]
        else:
            clusters = number(clusters, layout)
            place = increasing(central_cells(clusters.labels, layout, slots), sizes, clusters.live.sum(1))
            codes, mass = means(x, clusters.labels, slots, weights)
        if self.cross_attention is not None:
            codes = self.cross_attention(codes, describe(clusters.labels, layout, slots), clusters.live)
        errors = clusters.error().tolist() if chosen else [None] * len(clips)
        done = []
        for i, k in enumerate(clusters.live.sum(1).tolist()):
            code = Item(codes[i, :k].to(x.dtype), clips[i].positions[place[i, :k]], None, mass[i, :k])
            done.append((code, clusters.labels[i][mask[i]].view(grids[i]), errors[i]))
        return done

    def _released(self, clip: Item, grid: Grid, wanted: int) -> tuple[Item, Tensor, float | None]:
        """One clip by the published rules. The order of its codes is no order in time: places are spread evenly."""
        tokens, settings = clip.embeddings, self.config
        with torch.no_grad():
            fit = self._published_fit(tokens.detach(), wanted)
            labels, centers = fit.labels, fit.centers
            if self.cross_attention is None and settings.compat == "released":
                labels, order = released.first_occurrence(labels, len(centers))
                centers = centers[order]
        codes = released.code_means(tokens, labels, centers)
        mass = means(tokens[None, :, :0], labels[None], len(codes), clip.weights()[None])[1][0]
        if self.cross_attention is not None:
            codes = self.cross_attention(labels.view(grid[0], -1), codes)
            # Which tokens a row stands for is lost in the attention; all stand for an equal part of the clip.
            mass = clip.weights().sum().expand(len(codes)) / len(codes)
        places = torch.arange(len(codes), device=labels.device) * len(labels) // len(codes)
        return Item(codes.to(tokens.dtype), clip.positions[places], None, mass), labels.view(grid), None

    def _published_fit(self, tokens: Tensor, wanted: int) -> released.Fit:
        """The clustering of one clip by the rules of either era; of `wanted` clusters, or of at most as many."""
        settings, least = self.config, min(self.config.least, wanted)
        if settings.compat == "released_2025":
            generator = torch.Generator(tokens.device).manual_seed(settings.seed)
            if settings.choose == "fixed":
                return released.fit_2025(tokens, wanted, generator, settings.iterations)
            return released.search_2025(tokens, least, wanted, settings.choose, generator)
        if settings.choose == "fixed":
            return released.fit_2026(tokens, wanted, settings.seed, settings.iterations)
        return released.search_2026(tokens, least, wanted, settings.choose, settings.seed)

    def _check(self, items: Sequence[Item], grids: Sequence[Grid]) -> None:
        """Raises a ValueError where a grid, or the width that the attention reads, does not fit."""
        sizes = self.config.attention
        for item, grid in zip(items, grids, strict=True):
            (frames, height, width), native = grid, len(item.positions)
            if not 0 < frames * height * width <= native:
                raise ValueError(f"a grid of {frames} x {height} x {width} cells for {native} tokens")
            if sizes is not None and item.embeddings.shape[1] != sizes.width:
                raise ValueError(f"tokens are {item.embeddings.shape[1]} wide, the attention reads {sizes.width}")
            if sizes is not None and self.config.compat != "corrected" and height * width != sizes.patches:
                raise ValueError(
                    f"a grid has {height} x {width} cells a frame, the published attention reads {sizes.patches}"
                )

    def _choose(self, unit: Tensor, mask: Tensor, clusters: Clusters, budget: TokenBudget) -> Clusters:
        """Fewer clusters where the content needs no more."""
        most = clusters.live.sum(1)
        least = most.clamp(max=max(budget.min_tokens, 1))
        tree = adaptive.tree_of(clusters)
        if budget.target_error is not None:
            wanted = adaptive.by_error(adaptive.errors(clusters, tree), budget.target_error, least, most)
        else:
            least = least.clamp(min=self.config.least).minimum(most)
            if self.config.choose == "elbow":
                wanted = adaptive.by_elbow(adaptive.errors(clusters, tree), least, most)
            else:
                wanted = adaptive.by_silhouette(adaptive.silhouettes(unit, clusters, tree), least, most)
        return adaptive.merged(unit, mask, clusters, tree, wanted)


def _identity(grid: Grid, device: torch.device) -> Tensor:
    """The map of a clip that stays whole: every cell has its own token."""
    return torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
