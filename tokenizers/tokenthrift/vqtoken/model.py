"""VQToken as a model and as a token reducer: a whole clip in K tokens.

    with attach(model, VQToken(), TokenBudget(max_tokens=32)) as handle: ...       # no weights needed
    VQToken().reduce(tokens, TokenBudget.parse("32,e0.2"))                         # fewer where 20 % error allow it
    VQToken.from_pretrained("model_cards/vqtoken-tiny").compress(tokens, budget)   # tokens, index maps, codes

Source: VQToken (arXiv 2503.16980). All patches of a clip are clustered (`clustering.py`), the codes are the means of
the clusters (`codebook.py`), the token hash is the map of cluster numbers over (T, H, W) (`token_hash.py`), and
VQ-attention mixes the two (`attention.py`). Differs from the published code: the budget is met exactly (there the count
is the larger of frames and K), order and positions of the codes follow time, items of a batch have counts of their own,
and an image is a clip of one frame like any other instead of a special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetSupport, TokenBudget, TokenUsage
from tokenthrift.hub import HubModel
from tokenthrift.reducers.base import Item, check_finite, pad_items, unpad
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import adaptive
from tokenthrift.vqtoken.clustering import Clusters, find, number, unit_tokens
from tokenthrift.vqtoken.codebook import means, medoids
from tokenthrift.vqtoken.config import VQTokenConfig
from tokenthrift.vqtoken.places import Grid, central_cells, increasing, layout_of, ranks

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
    config: VQTokenConfig

    def __init__(self, config: VQTokenConfig | None = None) -> None:
        super().__init__(config or VQTokenConfig())

    @property
    def support(self) -> BudgetSupport:
        """What the model can honour."""
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
            BudgetError: The budget cannot be honoured.
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

    def _chooses(self, native: int, cap: int, budget: TokenBudget) -> bool:
        """Whether content decides how many codes a clip gets. A rule never touches a clip that may stay whole."""
        return budget.target_error is not None or (self.config.choose != "fixed" and cap < native)

    def _shrink(
        self, items: Sequence[Item], grids: Sequence[Grid], caps: Sequence[int], budget: TokenBudget
    ) -> list[tuple[Item, Tensor, float | None]]:
        """Clips of at least one token each: what is left of them, their index maps, and the error where one counts."""
        cells = [t * h * w for t, h, w in grids]
        for item, grid, n in zip(items, grids, cells, strict=True):
            if n > len(item.positions):
                raise ValueError(f"a grid of {' x '.join(map(str, grid))} cells for {len(item.positions)} tokens")
        # What follows the frames (a newline) stays where the budget has room for it and a code.
        rests = [
            rest if (rest := len(item.positions) - n) < cap else 0
            for item, n, cap in zip(items, cells, caps, strict=True)
        ]
        x = pad_sequence([item.embeddings[:n] for item, n in zip(items, cells, strict=True)], batch_first=True)
        weights = pad_sequence([item.weights()[:n] for item, n in zip(items, cells, strict=True)], batch_first=True)
        sizes = torch.tensor(cells, device=x.device)
        mask = torch.arange(x.shape[1], device=x.device) < sizes[:, None]
        wanted = torch.tensor([cap - rest for cap, rest in zip(caps, rests, strict=True)], device=x.device)
        layout = layout_of(mask, grids)
        unit, _ = unit_tokens(x, mask)
        clusters = find(unit, mask, wanted.minimum(sizes), iterations=self.config.iterations)
        chosen = self.config.choose != "fixed" or budget.target_error is not None
        if chosen:
            clusters = self._choose(unit, mask, clusters, budget)
        slots, counts = clusters.counts.shape[1], clusters.live.sum(1)
        if self.config.codes == "medoid":
            place = medoids(unit, clusters)
            order = ranks([place.where(clusters.live, x.shape[1])])
            clusters, place = clusters.mapped(order, slots), place.gather(1, order.argsort(1))
            codes = x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))
            mass = means(x[..., :0], clusters.labels, slots, weights)[1]
        else:
            clusters = number(clusters, layout)
            place = increasing(central_cells(clusters.labels, layout, slots), sizes, counts)
            codes, mass = means(x, clusters.labels, slots, weights)
        errors = clusters.error().tolist() if chosen else [None] * len(items)
        done = []
        for i, (item, grid, n, rest) in enumerate(zip(items, grids, cells, rests, strict=True)):
            k = int(counts[i])
            tail = item.select(torch.arange(n, n + rest, device=x.device))
            short = Item(
                torch.cat([codes[i, :k].to(x.dtype), tail.embeddings]),
                torch.cat([item.positions[place[i, :k]], tail.positions]),
                None,
                torch.cat([mass[i, :k], tail.weights()]),
            )
            done.append((short, clusters.labels[i, :n].view(grid), errors[i]))
        return done

    def _choose(self, unit: Tensor, mask: Tensor, clusters: Clusters, budget: TokenBudget) -> Clusters:
        """Fewer clusters where the content needs no more."""
        most = clusters.live.sum(1)
        least = torch.full_like(most, max(budget.min_tokens, 1)).minimum(most)
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
