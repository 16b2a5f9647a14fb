"""TokenBatch: a padded batch of tokens that knows where its tokens come from and what they cost.

It flows from an encoder through a reducer or tokenizer into a language model. Real tokens may lie on either side
of the padding; `mask` says where. Published reducers return a bare tensor and lose the source positions, the sizes
of merged tokens, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenthrift.budget import ItemSize, TokenUsage
from tokenthrift.padding import gather_rows, pad_rows, unpad_rows

__all__ = ["TokenBatch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """A batch of B items padded to N tokens of width D.

    Attributes:
        embeddings: (B, N, D) floating point; padding holds anything and is never read.
        mask: (B, N) bool, True where a token is real.
        positions: (B, N) int64, the index in the source of the (first) native token each stands for; -1 in padding.
        codes: (B, N) int64 discrete ids where the method has them, -1 in padding.
        sizes: (B, N) float32, how many native tokens each stands for, 0 in padding; None where tokens were dropped
            instead of merged, or nothing was done.
        sources: (B, M) int64 where tokens were merged: for each of the M native tokens of an item the index among its
            real tokens of the one that it became part of, -1 where it was dropped or there is none. None where every
            token stands for the native one at its position alone, or the reducer does not say.
        seconds: duration of every item, where known; `tokens_per_second` needs it.
        grids: frames, rows and columns of every item, where known: its first tokens fill them in raster order, and any
            that are left after them (a newline) belong to no frame. Tokens that were reduced have none.
        usage: one per item.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    codes: Tensor | None = None
    sizes: Tensor | None = None
    sources: Tensor | None = None
    seconds: tuple[float, ...] | None = None
    grids: tuple[tuple[int, int, int], ...] | None = None
    usage: tuple[TokenUsage, ...]

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 3:
            raise ValueError(f"embeddings must be (B, N, D), not {tuple(self.embeddings.shape)}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, not {self.mask.dtype}")
        for name in ("mask", "positions", "codes", "sizes"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != self.embeddings.shape[:2]:
                raise ValueError(
                    f"{name} must be {tuple(self.embeddings.shape[:2])} like the embeddings, not {tuple(tensor.shape)}"
                )
        for name in ("usage", "seconds", "grids", "sources"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.embeddings):
                raise ValueError(f"{len(self.embeddings)} items but {len(values)} entries in {name}")

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Tensor,
        mask: Tensor | None = None,
        seconds: Sequence[float] | None = None,
        grids: Sequence[tuple[int, int, int]] | None = None,
    ) -> Self:
        """Wraps what an encoder made, before any reduction.

        Args:
            embeddings: (B, N, D).
            mask: (B, N) bool, True where a token is real; all of them if not given.
            seconds: Duration of every item.
            grids: Frames, rows and columns of every item.
        """
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, -1)
        return cls(
            embeddings=embeddings,
            mask=mask,
            positions=positions,
            seconds=None if seconds is None else tuple(seconds),
            grids=None if grids is None else tuple(grids),
            usage=tuple(TokenUsage(native=n, cap=n, used=n) for n in mask.sum(1).tolist()),
        )

    @classmethod
    def from_items(
        cls,
        items: Sequence[Tensor],
        seconds: Sequence[float] | None = None,
        grids: Sequence[tuple[int, int, int]] | None = None,
    ) -> Self:
        """Pads items of unequal length on the right, with zeros.

        Args:
            items: B tensors (N_i, D) of one width, dtype and device; at least one.
            seconds: Duration of every item.
            grids: Frames, rows and columns of every item.
        """
        return cls.from_embeddings(*pad_rows(items), seconds, grids)

    def items(self) -> list[Tensor]:
        """The real tokens of every item: B tensors (N_i, D)."""
        return unpad_rows(self.embeddings, self.mask)

    def item_sizes(self) -> list[ItemSize]:
        """What a plan needs of every item: its tokens, and its seconds and grid where they are known."""
        counts = self.mask.sum(1).tolist()
        seconds = self.seconds or [None] * len(counts)
        grids = self.grids or [(None, None, None)] * len(counts)
        return [
            ItemSize(native=n, seconds=s, frames=frames, height=height, width=width)
            for n, s, (frames, height, width) in zip(counts, seconds, grids, strict=True)
        ]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The batch on another device, its embeddings in another precision."""
        changed: dict[str, Tensor | None] = {"embeddings": self.embeddings.to(device=device, dtype=dtype)}
        for name in ("mask", "positions", "codes", "sizes", "sources"):
            tensor: Tensor | None = getattr(self, name)
            changed[name] = None if tensor is None else tensor.to(device=device)
        return replace(self, **changed)  # type: ignore[arg-type]

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the items, in the given order; one may be there twice.

        Args:
            rows: indices into the batch.
        """
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.mask.device)
        return replace(
            self,
            embeddings=self.embeddings[index],
            mask=self.mask[index],
            positions=self.positions[index],
            codes=None if self.codes is None else self.codes[index],
            sizes=None if self.sizes is None else self.sizes[index],
            sources=None if self.sources is None else self.sources[index],
            seconds=None if self.seconds is None else tuple(self.seconds[row] for row in rows),
            grids=None if self.grids is None else tuple(self.grids[row] for row in rows),
            usage=tuple(self.usage[row] for row in rows),
        )

    def first(self, count: int | Sequence[int]) -> Self:
        """The first tokens of every item, left-aligned: what a nested system gives under a smaller budget.

        Args:
            count: tokens to keep of each, or one number for each item; an item that has fewer keeps what it has. The
                usage loses its error, which was that of all tokens.
        """
        counts = [count] * len(self.usage) if isinstance(count, int) else list(count)
        if len(counts) != len(self.usage) or min(counts, default=0) < 0:
            raise ValueError(f"{len(self.usage)} items need one count from 0, or one for each, not {counts}")
        kept = self.mask & (self.mask.long().cumsum(1) <= self._column(counts))
        width = int(kept.sum(1).max())
        order = (~kept).int().argsort(dim=1, stable=True)[:, :width]
        mask = kept.gather(1, order)
        usage = (
            replace(u, cap=min(u.cap, n), used=min(u.used, n), error=u.error if u.used <= n else None)
            for u, n in zip(self.usage, counts, strict=True)
        )
        return replace(
            self,
            embeddings=gather_rows(self.embeddings, order),
            mask=mask,
            positions=self.positions.gather(1, order).masked_fill(~mask, -1),
            codes=None if self.codes is None else self.codes.gather(1, order).masked_fill(~mask, -1),
            sizes=None if self.sizes is None else self.sizes.gather(1, order).masked_fill(~mask, 0.0),
            sources=None if self.sources is None else self.sources.where(self.sources < self._column(counts), -1),
            grids=None,
            usage=tuple(usage),
        )

    def _column(self, counts: Sequence[int]) -> Tensor:
        return torch.tensor(counts, device=self.mask.device)[:, None]

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """The items of several batches in one, padded on the right to the widest.

        Codes, sources, seconds and grids stay where all batches have them; sizes where any has some, 1 for the others.

        Args:
            batches: at least one, of one embedding width, dtype and device.
        """
        sized = any(batch.sizes is not None for batch in batches)

        def joined(name: str, fill: float) -> Any:
            parts = [getattr(batch, name) for batch in batches]
            if name == "sizes" and sized:
                parts = [batch.mask.float() if p is None else p for p, batch in zip(parts, batches, strict=True)]
            if any(part is None for part in parts):
                return None
            width = max(part.shape[1] for part in parts)
            return torch.cat(
                [pad(part, (0,) * (2 * part.ndim - 4) + (0, width - part.shape[1]), value=fill) for part in parts]
            )

        def known(name: str) -> Any:
            parts = [getattr(batch, name) for batch in batches]
            return None if any(part is None for part in parts) else tuple(value for part in parts for value in part)

        return cls(
            embeddings=joined("embeddings", 0),
            mask=joined("mask", False),
            positions=joined("positions", -1),
            codes=joined("codes", -1),
            sizes=joined("sizes", 0),
            sources=joined("sources", -1),
            seconds=known("seconds"),
            grids=known("grids"),
            usage=known("usage"),
        )
