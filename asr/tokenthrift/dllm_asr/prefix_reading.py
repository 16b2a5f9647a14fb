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
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from tokenthrift.backbones.causal import PrefixCache, prefill
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.padding import pad_rows

__all__ = ["PrefixReader", "prefix_readers", "read_prefixes"]


class PrefixReader:
    """A `CausalReader` over a Llama-like decoder that has read memory and prompt.

    Args:
        backbone: the denoiser whose language model reads.
        prefix: of one recording, so without padding.
        begin: tokens before the text: the last one of the prompt.
    """

    def __init__(self, backbone: PrefixBackbone, prefix: PrefixCache, begin: Sequence[int]) -> None:
        self.backbone, self.prefix, self.begin = backbone, prefix, list(begin)
        self.vocab_size = backbone.vocab_size
        self.cache, self.length = prefix.fork(), prefix.mask.shape[1]
        self.positions = int(backbone.lm.config.max_position_embeddings) - self.length - len(self.begin) + 1
        self._read: DynamicCache = self.cache

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `CausalReader.read`."""
        device = self.prefix.mask.device
        ids, real = (part.to(device) for part in pad_rows([torch.tensor(tokens) for tokens in continuations]))
        cache = replace(self.prefix, cache=self.cache).fork()
        if len(ids) > 1:
            cache.batch_repeat_interleave(len(ids))
        self._read = cache
        before = torch.ones(len(ids), self.length, dtype=torch.bool, device=device)
        positions = (self.length + torch.arange(ids.shape[1], device=device)).expand(len(ids), -1)
        logits: Tensor = self.backbone.lm(
            inputs_embeds=self.backbone.embed(ids),
            attention_mask=torch.cat([before, real], 1).long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return [row[: len(tokens)] for row, tokens in zip(logits, continuations, strict=True)]

    def received(self, new: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes the keys and values of continuations that were read in a batch, those of what was kept left out."""
        self._read = DynamicCache()
        for layer, (key, value) in enumerate(new):
            own = self.cache.layers[layer]
            old_key, old_value = (cast(Tensor, part).expand(len(key), -1, -1, -1) for part in (own.keys, own.values))
            self._read.update(torch.cat([old_key, key], 2), torch.cat([old_value, value], 2), layer)

    def keep(self, continuation: int, count: int) -> None:
        """See `CausalReader.keep`."""
        cache, self.length = self._read, self.length + count
        if len(cast(Tensor, cache.layers[0].keys)) > 1:
            cache.batch_select_indices(torch.tensor([continuation], device=self.prefix.mask.device))
        if (surplus := cache.get_seq_length() - self.length) > 0:
            cache.crop(-surplus)
        self.cache = cache


def read_prefixes(
    readers: Sequence[PrefixReader], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[Tensor]]:
    """Reads for several recordings in one pass, see `reading.BatchReader`: each row is as long as it is."""
    backbone, device = readers[0].backbone, readers[0].prefix.mask.device
    rows = [reader for reader, own in zip(readers, continuations, strict=True) for _ in own]
    texts = [torch.tensor(tokens) for own in continuations for tokens in own]
    ids, real = (part.to(device) for part in pad_rows(texts))
    kept = torch.tensor([reader.length for reader in rows], device=device)
    past = max(reader.length for reader in rows)
    there = torch.arange(past, device=device) < kept[:, None]
    cache = DynamicCache()
    for layer in range(len(readers[0].cache.layers)):
        parts = [reader.cache.layers[layer] for reader in rows]
        keys, values = (
            torch.cat([F.pad(part, (0, 0, 0, past - part.shape[2])) for part in cast("list[Tensor]", whole)])
            for whole in ([part.keys for part in parts], [part.values for part in parts])
        )
        cache.update(keys, values, layer)
    logits: Tensor = backbone.lm(
        inputs_embeds=backbone.embed(ids),
        attention_mask=torch.cat([there, real], 1).long(),
        position_ids=(kept[:, None] + torch.arange(ids.shape[1], device=device)).masked_fill(~real, 0),
        past_key_values=cache,
        use_cache=True,
    ).logits
    out, at = [], 0
    for reader, own in zip(readers, continuations, strict=True):
        here = slice(at, at + len(own))
        found = [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in cache.layers]
        reader.received([(key[here, :, past:], value[here, :, past:]) for key, value in found])
        out.append([row[: len(tokens)] for row, tokens in zip(logits[here], own, strict=True)])
        at = here.stop
    return out


def prefix_readers(backbone: PrefixBackbone, memory: Tensor, memory_mask: Tensor) -> list[PrefixReader]:
    """A reader for each row of `(B, N, memory_size)` with mask `(B, N)`."""
    header, before = backbone.embed(backbone.header), backbone.embed(backbone.prompt[:-1])
    last = backbone.prompt[-1:].tolist()
    readers = []
    for row, real in zip(memory, memory_mask, strict=True):
        start = torch.cat([header, row[real].to(header.dtype), before])
        readers.append(PrefixReader(backbone, prefill(backbone.lm, [start]), last))
    return readers
