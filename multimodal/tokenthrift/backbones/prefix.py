"""Masked-diffusion backbones that read the memory as a prefix of the text: BERT, ModernBERT, or a decoder without its
causal mask.

Source: dLLM-ASR (arXiv 2601.17902), sequence layout; LLaDA (arXiv 2502.09992), a Llama block whose attention sees both
ways; Fast-dLLM v2 (arXiv 2509.26328), whose attention is causal over blocks.

Differs from the published code: rows of a batch may differ in length. Each is packed without holes, memory, prompt,
response, padding, so positions and ModernBERT's sliding windows are those of the row alone, and attention never
reaches padding (upstream LLaDA ignores its attention mask). Only response slots reach the vocabulary projection. Where
the mask hides the response from the prefix, the prefix's keys and values are computed once, exactly: the published
caches of fully bidirectional models are approximations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tokenthrift.backbones.language_models import (
    check_model_type,
    language_model,
    trim_vocabulary,
    vocabulary_logits,
)
from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone, forbid, hinted, zero_padding
from tokenthrift.backbones.shape import DECODERS, AttentionMask
from tokenthrift.padding import gather_rows, pack

__all__ = ["AttentionMask", "Keys", "PrefixBackbone", "language_model", "pack", "trim_vocabulary"]


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values that later positions may attend to.

    Attributes:
        layers: keys and values (B, heads, K, width) of each layer.
        positions: (B, K) int64, where each stands in its row.
        exists: (B, K) bool.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    positions: Tensor
    exists: Tensor


class PrefixBackbone(MaskedDiffusionBackbone):
    """A language model whose input is [header, memory, prompt, response].

    Args:
        lm: a masked or causal language model, see `language_model`; `memory_size` is its embedding width.
        mask_id: id of MASK in its vocabulary.
        prompt: token ids between memory and response, the same for every row.
        header: token ids before the memory, the same for every row: what a chat template says before a user speaks.
        shifted: True where the model was pretrained to predict the token after each position (Dream, or any
            autoregressive start); the logits of a slot are then read one position earlier.
        attention: who sees whom; anything but "full" needs a decoder, was trained with, and lets `context` compute the
            prefix once and for all rounds.
        block_size: positions of a block, counted from the start of a row, for `attention="blocks"`.

    Raises:
        ValueError: a model family that is not supported, an attention other than SDPA, or an id outside of the
            vocabulary.
    """

    prompt: Tensor
    header: Tensor

    def __init__(
        self,
        lm: PreTrainedModel,
        mask_id: int,
        *,
        prompt: Sequence[int] = (),
        header: Sequence[int] = (),
        shifted: bool = False,
        attention: AttentionMask = "full",
        block_size: int = 32,
    ) -> None:
        super().__init__()
        check_model_type(lm.config.model_type)
        if lm.config._attn_implementation != "sdpa":
            raise ValueError(f'the model must use attn_implementation="sdpa", not {lm.config._attn_implementation!r}')
        if attention != "full" and lm.config.model_type not in DECODERS:
            raise ValueError(f"a {lm.config.model_type} sees both ways; attention {attention!r} needs {DECODERS}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.vocab_size, self.memory_size = cast(Tensor, lm.get_input_embeddings().weight).shape
        if not all(0 <= token < self.vocab_size for token in (mask_id, *header, *prompt)):
            raise ValueError(
                f"mask_id {mask_id} and prompt {[*header, *prompt]} must lie within 0..{self.vocab_size - 1}"
            )
        self.lm = lm
        self.mask_id = mask_id
        self.shifted = shifted
        self.attention: AttentionMask = attention
        self.block_size = block_size
        self.register_buffer("prompt", torch.tensor(list(prompt), dtype=torch.int64), persistent=False)
        self.register_buffer("header", torch.tensor(list(header), dtype=torch.int64), persistent=False)

    def context(self, memory: Tensor, memory_mask: Tensor) -> Context:
        """Packs header, memory and prompt, and computes the part of them that never sees the response.

        See `MaskedDiffusionBackbone.context`. The states are the packed embeddings and, unless all see all, the last
        hidden state of that part and its keys and values, layer by layer.
        """
        header, prompt = (self.embed(ids).expand(len(memory), -1, -1) for ids in (self.header, self.prompt))
        states = torch.cat([header, zero_padding(memory, memory_mask).to(prompt.dtype), prompt], 1)
        there = (memory_mask.new_ones(header.shape[:2]), memory_mask, memory_mask.new_ones(prompt.shape[:2]))
        states, mask = pack(states, torch.cat(there, 1))
        if self.attention == "full":
            return Context(mask, (states,))
        done = self._done(mask)
        width = int(done.max()) if len(done) else 0
        positions = torch.arange(width, device=mask.device).expand(len(mask), -1)
        lengths = mask.sum(1)
        hidden, keys = self.run(states[:, :width], positions, positions < done[:, None], lengths, None)
        last = hidden.new_zeros(len(mask), hidden.shape[-1])
        if width:
            last = gather_rows(hidden, (done - 1).clamp(min=0)[:, None]).squeeze(1)
        return Context(mask, (states, last, *(part for layer in keys.layers for part in layer)))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        context: Context,
        windows: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """Predicts every slot of a response; see `MaskedDiffusionBackbone.forward`. Windows are not used.

        Raises:
            ValueError: a row has more positions than the model was built for.
        """
        del windows
        return self.logits(self.read(ids, mask, context, hints)[0])

    def read(self, ids: Tensor, mask: Tensor, context: Context, hints: Tensor | None = None) -> tuple[Tensor, Keys]:
        """The hidden states (B, L, D) that say each slot, and the keys and values of every position; see `forward`."""
        states = context.states[0]
        response = self.embed(ids)
        if hints is not None:
            response = hinted(response, self.embed(hints), ids, hints, self.mask_id)
        lengths = context.mask.sum(1)
        longest, most = int((lengths + mask.sum(1)).max()), self.lm.config.max_position_embeddings
        if longest > most:
            raise ValueError(
                f"memory, prompt and response take {longest} positions, the model has {most}: "
                "shorten the input or the response"
            )
        past = self._past(context)
        done = self._done(context.mask) if past else torch.zeros_like(lengths)
        later = context.mask & (torch.arange(states.shape[1], device=mask.device) >= done[:, None])
        embeddings, seen = pack(torch.cat([states, response], 1), torch.cat([later, mask], 1))
        positions = done[:, None] + torch.arange(embeddings.shape[1], device=mask.device)
        hidden, keys = self.run(embeddings, positions, seen, lengths, past)
        slots = (lengths - done)[:, None] + torch.arange(ids.shape[1], device=ids.device) - int(self.shifted)
        # Padded slots may point beyond the row; they mean nothing, so any position serves.
        said = gather_rows(hidden, slots.clamp(0, max(0, hidden.shape[1] - 1)))
        if self.shifted and past:
            before = (slots < 0) & (done > 0)[:, None]
            said = torch.where(before[..., None], context.states[1][:, None], said)
        return said, keys

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores, without MASK."""
        return forbid(vocabulary_logits(self.lm, hidden), self.mask_id)

    def embed(self, ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids."""
        embedded: Tensor = self.lm.get_input_embeddings()(ids)
        return embedded

    def run(
        self, embeddings: Tensor, positions: Tensor, exists: Tensor, prefix: Tensor, past: Keys | None
    ) -> tuple[Tensor, Keys]:
        """Runs the layers over some positions of each row, beside keys and values of others.

        Args:
            embeddings: (B, T, D).
            positions: (B, T) int64, where each stands in its row.
            exists: (B, T) bool; other positions are invisible.
            prefix: (B,) positions of memory and prompt.
            past: what else is visible.

        Returns:
            (B, T, D) last hidden states, and the keys and values of `past` and of these positions.
        """
        trunk: Any = getattr(self.lm, self.lm.base_model_prefix)
        if self.lm.config.model_type not in DECODERS:
            encoded: Tensor = trunk(inputs_embeds=embeddings, attention_mask=exists)[0]
            return encoded, Keys((), positions, exists)
        if embeddings.shape[1] == 0:
            return embeddings, past or Keys((), positions, exists)
        cache, where, seen = DynamicCache(), positions, exists
        if past is not None:
            for layer, (key, value) in enumerate(past.layers):
                cache.update(key, value, layer)
            where, seen = torch.cat([past.positions, where], 1), torch.cat([past.exists, seen], 1)
        visible = seen[:, None] & self._sees(positions[..., None], where[:, None], prefix[:, None, None])
        # A padded position sees itself, so that its attention is not a division of nothing by nothing.
        own = torch.arange(where.shape[1], device=where.device) - (where.shape[1] - positions.shape[1])
        itself = own == torch.arange(positions.shape[1], device=where.device)[:, None]
        visible = visible | (itself & ~exists[..., None])
        # Four dimensions are taken as they are, so no causal mask is added.
        hidden: Tensor = trunk(
            inputs_embeds=embeddings,
            attention_mask=visible[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )[0]
        layers = tuple((cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in cache.layers)
        return hidden, Keys(layers, where, seen)

    def _sees(self, query: Tensor, key: Tensor, prefix: Tensor) -> Tensor:
        if self.attention == "full":
            return torch.ones_like(query == key)
        if self.attention == "prefix":
            return (key < prefix) | (query >= prefix)
        return key // self.block_size <= query // self.block_size

    def _done(self, mask: Tensor) -> Tensor:
        """(B,) positions of the prefix (B, N) that never see the response."""
        lengths = mask.sum(1)
        return lengths if self.attention == "prefix" else lengths // self.block_size * self.block_size

    def _past(self, context: Context) -> Keys | None:
        parts = context.states[2:]
        if not parts:
            return None
        positions = torch.arange(parts[0].shape[2], device=parts[0].device).expand(len(parts[0]), -1)
        layers = tuple(zip(parts[::2], parts[1::2], strict=True))
        return Keys(layers, positions, positions < self._done(context.mask)[:, None])
