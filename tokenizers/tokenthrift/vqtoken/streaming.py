"""Clips of any length in the memory of a few frames.

    stream = Stream()
    maps = [stream.push(frames) for frames in chunks]               # (T, H, W, D) at a time
    done = stream.finish(32)
    done.tokens, [done.resolve(m) for m in maps]                    # codes of the clip, and the index of each cell

Ours: the published code needs all frames at once, and its cost and its error grow with them (paper, section 5, names it
as a limit). Here each chunk is clustered by itself, from the codes held so far and from fresh seeds. Its clusters join
the codes held, and the cheapest pairs merge, weighted by their tokens, until `codebook_size` are left. Sums and counts
are exact, so every merge has the loss that the tokens themselves would give, although they are no longer held. Only
the table of what each cluster merged into grows, by a few hundred bytes a chunk.

Limits: codes are means, and there is no VQ-attention, which needs the map of the whole clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.budget import BudgetError, BudgetLike, TokenBudget, TokenUsage
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import adaptive
from tokenthrift.vqtoken.clustering import Clusters, find, lloyd, unit_tokens
from tokenthrift.vqtoken.codebook import means
from tokenthrift.vqtoken.hierarchy import Tree, merge_all
from tokenthrift.vqtoken.token_hash import increasing, ranks

__all__ = ["Stream", "Streamed"]

PASSES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """What became of a stream.

    Attributes:
        tokens: The codes as a batch of one clip, in order of time; its usage holds the error.
        assignment: (ids,) int64: the index of the code that each cluster ever made belongs to.
    """

    tokens: TokenBatch
    assignment: Tensor

    def resolve(self, ids: Tensor) -> Tensor:
        """Turns the ids of `Stream.push` into indices of codes: int64 of the same shape."""
        return self.assignment[ids]


class Stream:
    """Compresses one clip chunk by chunk.

    Args:
        codebook_size: Most codes kept between chunks, and so the most that the final budget can have. Three times the
            final number is enough.
    """

    def __init__(self, codebook_size: int = 96) -> None:
        if codebook_size < 1:
            raise ValueError(f"codebook_size is at least 1, not {codebook_size}")
        self.codebook_size = codebook_size
        self.frames = 0
        self._side: tuple[int, int] | None = None
        self._dtype = torch.float32
        self._sums = torch.zeros(0)  # (M, D) float64 of unit tokens
        self._raw = torch.zeros(0)  # (M, D) float64 of tokens as they are
        self._counts = torch.zeros(0)  # (M,) int64
        self._cells = torch.zeros(0)  # (M, 3) int64 sums of frame, row and column
        self._owner = torch.zeros(0)  # (ids,) int64: which of the M each cluster ever made belongs to

    @torch.no_grad()
    def push(self, frames: Tensor) -> Tensor:
        """Takes the next frames.

        Args:
            frames: (T, H, W, D) of any floating-point dtype; H, W and D never change. Half a minute at a time is good.

        Returns:
            (T, H, W) int64 ids for `Streamed.resolve`.

        Raises:
            ValueError: Another size than before, no frame, or a token that is NaN or infinite.
        """
        if frames.ndim != 4 or not frames.numel():
            raise ValueError(f"expected frames (T, H, W, D), got {tuple(frames.shape)}")
        if self._side is None:
            self._begin(frames)
        kind = (self._side, self._sums.shape[1])
        if kind != (tuple(frames.shape[1:3]), frames.shape[3]):
            raise ValueError(f"frames are {tuple(frames.shape[1:])}, those before were {kind}")
        x = frames.reshape(1, -1, frames.shape[3])
        unit, mask = unit_tokens(x, None)
        fresh = self.codebook_size if not len(self._counts) else max(8, self.codebook_size // 3)
        found = find(unit, mask, mask.sum(1).clamp(max=fresh))
        if len(self._counts):
            start = torch.cat([normalize(self._sums, dim=1), normalize(found.sums[0], dim=1)])[None]
            found = lloyd(unit, mask, start, PASSES)
        live = found.live[0]
        labels = (live.cumsum(0) - 1)[found.labels]
        raw, mass = means(x, labels, int(live.sum()))
        ids = labels.view(frames.shape[:3]) + len(self._owner)
        self._join(found.sums[0, live], (raw * mass[..., None])[0].double(), found.counts[0, live], labels, ids.shape)
        self.frames += len(frames)
        return ids

    def finish(self, budget: BudgetLike, seconds: float | None = None) -> Streamed:
        """The codes of all frames so far; more may be pushed afterwards.

        Args:
            budget: Ceilings for the whole clip; with a target error, the fewest codes that reach it. Frames that are
                alike may have left fewer codes than it allows; then those are all there are.
            seconds: The duration, which `tokens_per_second` needs.

        Raises:
            BudgetError: The budget cannot be honored, or asks for more than `codebook_size`.
            ValueError: There was no frame.
        """
        budget = TokenBudget.parse(budget)
        if self._side is None:
            raise ValueError("a stream needs at least one frame")
        native, (height, width) = int(self._counts.sum()), self._side
        cap = budget.cap(native, seconds)
        if budget.target_error is not None:
            cap = min(cap, self.codebook_size)
        elif cap > self.codebook_size:
            raise BudgetError(
                f"{cap} tokens of a stream", f"at most codebook_size={self.codebook_size}", self.codebook_size
            )
        if not cap:
            return self._nothing(native, seconds)
        clusters, tree = self._tree()
        most = torch.tensor([min(cap, len(self._counts))], device=self._counts.device)
        if budget.target_error is not None:
            least = most.clamp(max=max(budget.min_tokens, 1))
            target = most.new_tensor([budget.target_error], dtype=torch.float64)
            most = adaptive.by_error(adaptive.errors(clusters, tree), target, least, most)
        k = int(most)
        error = float(adaptive.errors(clusters, tree)[0, k - 1])
        owner = tree.at(most)[0]
        counts, raw, cells = (_joined(part, owner, k) for part in (self._counts, self._raw, self._cells))
        middle = (2 * cells + counts[:, None]) // (2 * counts[:, None])
        positions = (middle[:, 0] * height + middle[:, 1]) * width + middle[:, 2]
        rank = ranks([positions[None]])[0]
        order = rank.argsort()
        sizes = torch.tensor([native], device=counts.device)
        tokens = TokenBatch(
            embeddings=(raw / counts[:, None])[order][None].to(self._dtype),
            mask=torch.ones(1, k, dtype=torch.bool, device=counts.device),
            positions=increasing(positions[order][None], sizes, most),
            sizes=counts[order][None].float(),
            seconds=None if seconds is None else (seconds,),
            usage=(TokenUsage(native=native, cap=cap, used=k, error=error),),
        )
        return Streamed(tokens, rank[owner][self._owner])

    def _nothing(self, native: int, seconds: float | None) -> Streamed:
        """The result under a budget that allows no token."""
        tokens = TokenBatch(
            embeddings=self._raw[None, :0].to(self._dtype),
            mask=self._counts[None, :0].bool(),
            positions=self._counts[None, :0],
            sizes=self._counts[None, :0].float(),
            seconds=None if seconds is None else (seconds,),
            usage=(TokenUsage(native=native, cap=0, used=0),),
        )
        return Streamed(tokens, torch.full_like(self._owner, -1))

    def _begin(self, frames: Tensor) -> None:
        self._side, self._dtype = (frames.shape[1], frames.shape[2]), frames.dtype
        self._sums = self._raw = frames.new_zeros(0, frames.shape[3], dtype=torch.float64)
        self._counts = self._owner = torch.zeros(0, dtype=torch.long, device=frames.device)
        self._cells = self._counts.new_zeros(0, 3)

    def _join(self, sums: Tensor, raw: Tensor, counts: Tensor, labels: Tensor, shape: torch.Size) -> None:
        """Adds the clusters of a chunk to those held, and merges the cheapest until `codebook_size` are left."""
        _, height, width = shape
        index = torch.arange(labels.shape[1], device=labels.device)
        frame = index // (height * width) + self.frames
        cell = torch.stack([frame, index // width % height, index % width], 1)
        cells = cell.new_zeros(len(counts), 3).index_add(0, labels[0], cell)
        self._owner = torch.cat([self._owner, len(self._counts) + torch.arange(len(counts), device=labels.device)])
        self._sums, self._raw = torch.cat([self._sums, sums]), torch.cat([self._raw, raw])
        self._counts, self._cells = torch.cat([self._counts, counts]), torch.cat([self._cells, cells])
        if (have := len(self._counts)) > self.codebook_size:
            owner = self._tree()[1].at(self._counts.new_tensor([min(self.codebook_size, have)]))[0]
            self._owner = owner[self._owner]
            for name in ("_sums", "_raw", "_counts", "_cells"):
                setattr(self, name, _joined(getattr(self, name), owner, self.codebook_size))

    def _tree(self) -> tuple[Clusters, Tree]:
        sums, counts = self._sums[None], self._counts[None]
        return Clusters(self._owner[None], sums, counts), merge_all(sums, counts, counts > 0)


def _joined(values: Tensor, owner: Tensor, slots: int) -> Tensor:
    """Sums of the (M, ...) values that have one owner: (slots, ...)."""
    return values.new_zeros(slots, *values.shape[1:]).index_add(0, owner, values)
