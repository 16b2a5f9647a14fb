"""TokenBatch: a padded batch of tokens that knows where its tokens come from and what they cost.

It flows from an encoder through a reducer or tokenizer into a language model. Real tokens may lie on either side
of the padding; `mask` says where. Published reducers return a bare tensor and lose the source positions, the sizes
of merged tokens, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import TokenUsage

__all__ = ["TokenBatch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBatch:
    """A batch of B items padded to N tokens of width D.

    Attributes:
        embeddings: (B, N, D) floating point; padding holds anything and is never read.
        mask: (B, N) bool, True where a token is real.
        positions: (B, N) int64, the place in the source of the (first) native token each stands for; -1 in padding.
        codes: (B, N) int64 discrete ids where the method has them, -1 in padding.
        sizes: (B, N) float32, how many native tokens each stands for, 0 in padding; None where tokens were dropped
            instead of merged, or nothing was done.
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
        for name in ("usage", "seconds", "grids"):
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
        lengths = torch.tensor([len(item) for item in items], device=items[0].device)
        embeddings = pad_sequence(list(items), batch_first=True)
        mask = torch.arange(embeddings.shape[1], device=lengths.device) < lengths[:, None]
        return cls.from_embeddings(embeddings, mask, seconds, grids)

    def items(self) -> list[Tensor]:
        """The real tokens of every item: B tensors (N_i, D)."""
        return [row[keep] for row, keep in zip(self.embeddings, self.mask, strict=True)]
