"""The causal reading of a Llama-like decoder over [header, memory, prompt, text].

Source: `backbones.causal`, whose `PrefixCache` holds what stands before the text, under the mask of an ordinary
language model. The weights are those of the denoiser, which sees both ways; a model that was trained in both ways
writes with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from tokenthrift.backbones.causal import PrefixCache, prefill
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.padding import pad_rows

__all__ = ["PrefixReader", "prefix_readers"]


class PrefixReader:
    """A `CausalReader` over a Llama-like decoder that has read memory and prompt.

    Args:
        backbone: the denoiser whose language model reads.
        prefix: of one recording.
        begin: tokens before the text: the last one of the prompt.
    """

    def __init__(self, backbone: PrefixBackbone, prefix: PrefixCache, begin: Sequence[int]) -> None:
        self.backbone, self.prefix, self.begin = backbone, prefix, list(begin)
        self.vocab_size = backbone.vocab_size
        most = int(backbone.lm.config.max_position_embeddings)
        self.positions = most - int(prefix.next_positions[0]) - len(self.begin) + 1
        self._cache, self._length = prefix.fork(), prefix.mask.shape[1]
        self._read: DynamicCache = self._cache

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `CausalReader.read`."""
        device = self.prefix.mask.device
        ids, real = (part.to(device) for part in pad_rows([torch.tensor(tokens) for tokens in continuations]))
        cache = replace(self.prefix, cache=self._cache).fork()
        if len(ids) > 1:
            cache.batch_repeat_interleave(len(ids))
        self._read = cache
        before = torch.ones(len(ids), self._length, dtype=torch.bool, device=device)
        first = int(self.prefix.next_positions[0]) + self._length - self.prefix.mask.shape[1]
        positions = (first + torch.arange(ids.shape[1], device=device)).expand(len(ids), -1)
        logits: Tensor = self.backbone.lm(
            inputs_embeds=self.backbone.embed(ids),
            attention_mask=torch.cat([before, real], 1).long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return [row[: len(tokens)] for row, tokens in zip(logits, continuations, strict=True)]

    def keep(self, continuation: int, count: int) -> None:
        """See `CausalReader.keep`."""
        cache, self._length = self._read, self._length + count
        if len(cast(Tensor, cache.layers[0].keys)) > 1:
            cache.batch_select_indices(torch.tensor([continuation], device=self.prefix.mask.device))
        if (surplus := cache.get_seq_length() - self._length) > 0:
            cache.crop(-surplus)
        self._cache = cache


def prefix_readers(backbone: PrefixBackbone, memory: Tensor, memory_mask: Tensor) -> list[PrefixReader]:
    """A reader for each row of `(B, N, memory_size)` with mask `(B, N)`."""
    header, before = backbone.embed(backbone.header), backbone.embed(backbone.prompt[:-1])
    last = backbone.prompt[-1:].tolist()
    readers = []
    for row, real in zip(memory, memory_mask, strict=True):
        start = torch.cat([header, row[real].to(header.dtype), before])
        readers.append(PrefixReader(backbone, prefill(backbone.lm, [start]), last))
    return readers
