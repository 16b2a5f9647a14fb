"""Whisper's decoder over encoder states: without its causal mask to denoise, with it to write left to right.

Source: Radford et al. 2022 (arXiv 2212.04356) for the decoder; MDM-ASR (arXiv 2602.18952) for taking the causal mask
off an encoder-decoder recognizer; Dream (Qwen-initialized diffusion) for keeping the shift of an autoregressive start:
position i still predicts token i + 1, so the pretrained weights mean what they meant and slot i is read from the
position before it.

What differs: the causal mask is not cut but faded, each head learns how much it looks at later slots and starts with
almost nothing, so that the pretrained decoder begins as itself; slots of a draft know when they are spoken, and their
cross-attention is kept near that time (a Gaussian bias without weights of its own), which is what a decoder that writes
all slots at once lacks most; the vocabulary is trimmed and has a MASK token, padding of memory and text is masked
(transformers' Whisper has no mask for either), and the keys and values of the cross-attention are computed once per
recording and reused in every round.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone, forbid, hinted, zero_padding
from tokenthrift.whisper import Attention

__all__ = ["Cache", "DecoderLayer", "WhisperDecoder", "WhisperDecoderBackbone", "decoder_weights", "window_bias"]

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(B, heads, positions, hidden_size / heads)`."""


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, with the key names of transformers' Whisper."""

    def __init__(self, hidden_size: int, num_attention_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden_size, num_attention_heads)
        self.encoder_attn = Attention(hidden_size, num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.encoder_attn_layer_norm = nn.LayerNorm(hidden_size)
        self.fc1, self.fc2 = nn.Linear(hidden_size, intermediate_size), nn.Linear(intermediate_size, hidden_size)
        self.final_layer_norm = nn.LayerNorm(hidden_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer over `x` `(B, L, hidden_size)`; also the keys and values of all positions so far."""
        h = self.self_attn_layer_norm(x)
        keys, values = self.self_attn.keys_values(h)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        x = x + self.self_attn(h, (keys, values), mask)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), memory, memory_mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), (keys, values)


class WhisperDecoder(nn.Module):
    """Text and memory to hidden states; the caller decides who sees whom.

    Args:
        vocab_size: tokens, special ones included.
        hidden_size: width of the model and of the memory.
        num_hidden_layers: decoder layers.
        num_attention_heads: attention heads.
        intermediate_size: width of the feed-forward.
        max_position_embeddings: longest text, start tokens included.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        max_position_embeddings: int,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_positions = nn.Embedding(max_position_embeddings, hidden_size)
        self.num_attention_heads = num_attention_heads
        sizes = (hidden_size, num_attention_heads, intermediate_size)
        self.layers = nn.ModuleList(DecoderLayer(*sizes) for _ in range(num_hidden_layers))
        self.layer_norm = nn.LayerNorm(hidden_size)
        # Where set, it computes the scores of the vocabulary in place of the embedding; `recognizers.precision` does.
        self.projection: nn.Module | None = None

    def context(self, memory: Tensor, memory_mask: Tensor) -> Context:
        """Cross-attention keys and values of all layers, each `(B, heads, N, hidden_size / heads)`."""
        memory = zero_padding(memory, memory_mask)
        cross = [cast(DecoderLayer, layer).encoder_attn for layer in self.layers]
        return Context(memory_mask, tuple(part for block in cross for part in block.keys_values(memory)))

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        context: Context,
        past: Cache | None = None,
        windows: Tensor | None = None,
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Cache]:
        """Hidden states of a piece of text.

        Args:
            ids: `(B, L)` tokens that follow those in `past`.
            mask: broadcastable to `(B, heads, L, past + L)`, true where a position may look, or added to the scores;
                with one more axis in front, one for each layer; None for everywhere.
            context: of the same rows.
            past: keys and values of the positions before, by layer.
            windows: `(B, L, 2)` memory positions that each position of the text should look at, see `window_bias`.
            embeddings: `(B, L, hidden_size)` in place of those of `ids`.
            positions: `(B, L)` where each token stands in its row; those after `past` if not given.

        Returns:
            `(B, L, hidden_size)` normalized hidden states, and the keys and values of all positions.
        """
        start = past[0][0].shape[2] if past else 0
        end = start + ids.shape[1]
        if positions is None and end > self.embed_positions.num_embeddings:
            raise ValueError(
                f"text takes {end} positions, the model has {self.embed_positions.num_embeddings}: shorten the response"
            )
        where = self.embed_positions.weight[start:end] if positions is None else self.embed_positions(positions)
        x = (self.embed_tokens(ids) if embeddings is None else embeddings) + where
        seen = context.mask[:, None, None]
        if windows is not None:
            seen = window_bias(windows, seen.shape[-1]).to(x.dtype).unsqueeze(1).masked_fill(~seen, float("-inf"))
        caches: Cache = []
        for i, layer in enumerate(self.layers):
            memory = (context.states[2 * i], context.states[2 * i + 1])
            own = mask[i] if mask is not None and mask.ndim == 5 else mask
            x, cache = layer(x, own, memory, seen, past[i] if past else None)
            caches.append(cache)
        return self.layer_norm(x), caches

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary scores of hidden states, with the embedding as projection."""
        if self.projection is not None:
            return cast(Tensor, self.projection(hidden))
        return F.linear(hidden, self.embed_tokens.weight)


class WhisperDecoderBackbone(MaskedDiffusionBackbone):
    """A Whisper decoder that sees both ways and predicts every slot at once.

    Args:
        decoder: the decoder; `memory_size` is its width.
        mask_id: id of MASK in its vocabulary.
        start: ids before the response (Whisper's start tokens); the last one predicts slot 0.
    """

    start: Tensor

    def __init__(self, decoder: WhisperDecoder, mask_id: int, start: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.vocab_size, self.memory_size = decoder.embed_tokens.weight.shape
        self.mask_id = mask_id
        self.register_buffer("start", torch.tensor(start), persistent=False)
        # Times 10, so that a learning rate fit for the weights also moves it: -0.4 leaves a later slot 2 % of its
        # weight.
        self.future = nn.Parameter(torch.full((len(decoder.layers), decoder.num_attention_heads), -0.4))

    def context(self, memory: Tensor, memory_mask: Tensor) -> Context:
        """See `MaskedDiffusionBackbone.context`."""
        return self.decoder.context(memory, memory_mask)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        context: Context,
        windows: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """See `MaskedDiffusionBackbone.forward`."""
        hidden = self.hidden(ids, mask, context, windows, hints)
        return forbid(self.decoder.logits(hidden[:, len(self.start) - 1 : -1]), self.mask_id)

    def hidden(
        self,
        ids: Tensor,
        mask: Tensor,
        context: Context,
        windows: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """(B, S + L, D) last hidden states of the S start tokens and the slots; see `forward`."""
        start = self.start.expand(len(ids), -1)
        seen = torch.cat([torch.ones_like(start, dtype=torch.bool), mask], 1)
        if windows is not None:
            # The position before a slot predicts it, so it looks where the slot's words are.
            anywhere = torch.tensor([0.0, float("inf")], device=ids.device).expand(len(ids), start.shape[1], 2)
            # The last slot of a row predicts nothing and keeps its own, whatever longer neighbors have after it.
            own = torch.cat([anywhere[:, :1], windows], 1)
            windows = torch.where(F.pad(mask, (0, 1))[..., None], F.pad(windows, (0, 0, 0, 1)), own)
            windows = torch.cat([anywhere[:, 1:], windows], 1)
        ids = torch.cat([start, ids], 1)
        embeddings = self.decoder.embed_tokens(ids)
        if hints is not None:
            hints = torch.cat([torch.full_like(start, self.mask_id), hints], 1)
            embeddings = hinted(embeddings, self.decoder.embed_tokens(hints), ids, hints, self.mask_id)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=embeddings.dtype, device=ids.device).triu(1)
        bias = 10.0 * self.future[:, None, :, None, None] * later
        masks = bias.masked_fill(~seen[:, None, None], float("-inf"))
        hidden: Tensor = self.decoder(ids, masks, context, windows=windows, embeddings=embeddings)[0]
        return hidden


def window_bias(windows: Tensor, size: int, softness: float = 10.0) -> Tensor:
    """Keeps the attention of each slot near the part of the memory where its words are expected.

    Args:
        windows: `(B, L, 2)` first and last memory position of each slot.
        size: memory positions.
        softness: standard deviation, in positions, of the Gaussian fall outside of the window.

    Returns:
        `(B, L, size)` to add to attention scores: 0 inside of the window, never below -30.
    """
    at = torch.arange(size, device=windows.device)
    outside = (windows[..., :1] - at).clamp(min=0) + (at - windows[..., 1:]).clamp(min=0)
    return (-0.5 * (outside / softness) ** 2).clamp(min=-30.0)


def decoder_weights(state: dict[str, Tensor], keep: list[int], extra: int, positions: int) -> dict[str, Tensor]:
    """Tensors of a `WhisperDecoder` from a transformers Whisper state dict.

    Args:
        state: keys `model.decoder.*`.
        keep: ids of the tokens to keep, in their new order.
        extra: rows to append for new tokens, each the mean of the kept ones.
        positions: positions to keep.

    Raises:
        ValueError: the checkpoint has fewer positions.
    """
    kept = {k.removeprefix("model.decoder."): v for k, v in state.items() if k.startswith("model.decoder.")}
    rows = kept["embed_tokens.weight"][torch.tensor(keep)]
    kept["embed_tokens.weight"] = torch.cat([rows, rows.mean(0, keepdim=True).expand(extra, -1)])
    if (most := len(kept["embed_positions.weight"])) < positions:
        raise ValueError(f"a decoder of {most} positions cannot have {positions}")
    kept["embed_positions.weight"] = kept["embed_positions.weight"][:positions]
    return kept
