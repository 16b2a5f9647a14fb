"""Every system as the input of every language model: it encodes, reduces, and says how wide its tokens are.

A `Prefix` is a token reducer with an encoder in front. Its tokens have the system's own width; `PrefixProjector` brings
them to that of a language model, and what comes out is what all backbones read, causal or masked-diffusion:

    prefix = load_prefix("model_cards/karl-tiny-64")
    tokens = PrefixProjector(prefix.token_size, 256, backbone.memory_size)(prefix.reduce(prefix.encode(images), 8))
    backbone(tokens.embeddings, tokens.mask, ids, mask)             # CausalBackbone
    backbone.context(tokens.embeddings, tokens.mask)                # MaskedDiffusionBackbone

Source: the projector of LLaVA-1.5 (arXiv 2310.03744), a perceptron of two layers. What differs: it reads besides where
in the item a token stands and how many native tokens it stands for, because a reduced token may stand anywhere and for
any number; its output is normalized to the length that embeddings of a language model have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenthrift.budget import BudgetLike, BudgetSupport, SizeLike, TokenUsage, sizes_of
from tokenthrift.config import ConfigError
from tokenthrift.models import find, load
from tokenthrift.reducers.pooling import AveragePooling
from tokenthrift.registry import resolve, those_with
from tokenthrift.tokens import TokenBatch

__all__ = ["Prefix", "PrefixProjector", "StatesPrefix", "load_prefix"]

_WAVES = 4
_EMBEDDING_LENGTH = 0.1
"""Of a coordinate of a word of a small language model, about; training finds the right one."""


class Prefix(Protocol):
    """A system in front of a language model."""

    @property
    def kind(self) -> str:
        """What it reads: image, video, audio or lips."""

    @property
    def token_size(self) -> int:
        """Width of a token."""

    @property
    def support(self) -> BudgetSupport:
        """What `reduce` honors."""

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`."""

    def encode(self, items: Sequence[Any]) -> TokenBatch:
        """Native tokens of items, as the system takes them.

        Raises:
            ValueError: an item that the system cannot read.
        """

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`."""


class StatesPrefix:
    """States of an encoder, pooled to the budget: the prefix of the speech systems.

    Args:
        kind: audio or lips.
        token_size: width of a state.
        encode: items to states (B, N, token_size) and how many each item has, (B,).
        native: how many states an item of a known size has.
    """

    def __init__(
        self,
        kind: str,
        token_size: int,
        encode: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
        native: Callable[[Any], int],
    ) -> None:
        self.kind, self.token_size = kind, token_size
        self._encode, self._native = encode, native
        self._pooling = AveragePooling()

    @property
    def support(self) -> BudgetSupport:
        """That of average pooling."""
        return self._pooling.support

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`."""
        sizes = [
            size if size.native is not None else replace(size, native=self._native(size)) for size in sizes_of(items)
        ]
        return self._pooling.plan(sizes, budget)

    @torch.no_grad()
    def encode(self, items: Sequence[Tensor]) -> TokenBatch:
        """See `Prefix.encode`."""
        states, lengths = self._encode(items)
        return TokenBatch.from_items([row[:n] for row, n in zip(states, lengths.tolist(), strict=True)])

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`."""
        return self._pooling.reduce(tokens, budget)


def load_prefix(source: str | Path, *, kind: str | None = None, weights: bool = True, **options: Any) -> Prefix:
    """The prefix of whatever model a folder or a Hub id holds.

    Args:
        source: a folder, or `owner/name`.
        kind: which of its inputs, where a system has several; its first if not given.
        weights: without them it can plan and not encode.
        options: of `models.load`: device, dtype, cache_dir, token, local_files_only.

    Raises:
        ConfigError: the system is no prefix.
        SourceError, WeightsError: as `models.load`.
    """
    model = load(source, **options) if weights else find(source).model
    target = those_with("prefix").get(model.system)
    if target is None:
        raise ConfigError(
            f"{source}: a {type(model).__name__} gives no prefix; these systems do: {', '.join(those_with('prefix'))}"
        )
    prefix: Prefix = resolve(target)(model) if kind is None else resolve(target)(model, kind)
    return prefix


class PrefixProjector(nn.Module):
    """Tokens of a prefix to embeddings of a language model.

    Args:
        token_size: width of the tokens.
        hidden_size: of the perceptron.
        memory_size: width of the language model, `memory_size` of a backbone.
    """

    def __init__(self, token_size: int, hidden_size: int, memory_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(token_size)
        self.up = nn.Linear(token_size + 2 * _WAVES + 1, hidden_size)
        self.down = nn.Linear(hidden_size, memory_size)
        self.scale = nn.LayerNorm(memory_size)
        nn.init.constant_(self.scale.weight, _EMBEDDING_LENGTH)

    def forward(self, tokens: TokenBatch) -> TokenBatch:
        """The same tokens, (B, N, memory_size), zero in padding."""
        contents = tokens.embeddings.masked_fill(~tokens.mask[..., None], 0).to(self.up.weight)
        native = torch.tensor([max(usage.native - 1, 1) for usage in tokens.usage], device=contents.device)
        where = tokens.positions.clamp(min=0).to(contents) / native[:, None].to(contents)
        angles = where[..., None] * (math.pi / 2) * 2.0 ** torch.arange(_WAVES, device=contents.device)
        sizes = tokens.mask.to(contents) if tokens.sizes is None else tokens.sizes.to(contents)
        extent = sizes.clamp(min=1).log()[..., None] / 4
        states = torch.cat([self.norm(contents), angles.sin().to(contents), angles.cos().to(contents), extent], -1)
        states = self.scale(self.down(nn.functional.gelu(self.up(states))))
        return replace(tokens, embeddings=states.masked_fill(~tokens.mask[..., None], 0))
