"""Decoding with cached keys and values: a prefix backbone as the `CachedPredict` of the samplers.

Source: Fast-dLLM (arXiv 2505.22618, section 3.2), prefix cache and dual cache; Fast-dLLM v2 (arXiv 2509.26328), whose
attention over blocks makes the cache exact.

Differs from the published code: keys are kept after their rotation, which is the same because a position never moves;
rows may have prefixes of different lengths; with `attention="blocks"` and blocks that line up with the model's (the
sampler's option `aligned`), what a window reads equals the full pass, and with "full" it is the published
approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenthrift.backbones.masked import Context
from tokenthrift.backbones.prefix import Keys, PrefixBackbone
from tokenthrift.padding import length_mask

__all__ = ["CachedBackbone"]


class CachedBackbone:
    """A backbone and the context of a batch, for `samplers.sample`; holds the state of one decoding.

        sample(CachedBackbone(backbone, context), canvas, FastDllmSampler(cache="dual", block_length=32), tokens)

    Args:
        backbone: a decoder; BERT and ModernBERT keep no keys.
        context: what the backbone made of the memory of each row.
    """

    def __init__(self, backbone: PrefixBackbone, context: Context) -> None:
        self.backbone, self.context = backbone, context
        self._keys: Keys | None = None
        self._said = self._ends = self._prefix = torch.empty(0)

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """See `samplers.CachedPredict`."""
        logits: Tensor = self.backbone(ids, mask, self.context.select(rows))
        return logits

    def refresh(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """See `samplers.CachedPredict`.

        Raises:
            ValueError: a canvas with padding on the left, or a model that keeps no keys.
        """
        if not torch.equal(mask, length_mask(mask.sum(1), mask.shape[1])):
            raise ValueError("cached keys and values need rows that are padded on the right")
        context = self.context.select(rows)
        self._said, self._keys = self.backbone.read(ids, mask, context)
        if not self._keys.layers:
            raise ValueError(f"a {self.backbone.lm.config.model_type} keeps no keys: use a sampler without cache")
        self._prefix, self._ends = context.mask.sum(1), mask.sum(1)
        return self.backbone.logits(self._said)

    def within(self, ids: Tensor, rows: Tensor, start: int) -> Tensor:
        """See `samplers.CachedPredict`."""
        del rows
        assert self._keys is not None
        slots = start + torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        positions, kept = self._prefix[:, None] + slots, self._keys
        replaced = (kept.positions >= positions[:, :1]) & (kept.positions <= positions[:, -1:])
        past = Keys(kept.layers, kept.positions, kept.exists & ~replaced)
        exists = slots < self._ends[:, None]
        hidden, _ = self.backbone.run(self.backbone.embed(ids), positions, exists, self._prefix, past)
        if self.backbone.shifted:
            hidden = torch.cat([self._said[:, start : start + 1], hidden[:, :-1]], 1)
        return self.backbone.logits(hidden)
