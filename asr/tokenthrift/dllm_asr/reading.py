"""The causal reading of the language model that denoises: the same weights, left to right, with keys and values kept.

Source: what a decoder writes left to right is the baseline of dLLM-ASR (arXiv 2601.17902). Here it is a second reading
of one network: Whisper's decoder with its causal mask; a Llama-like decoder is read by `prefix_reading`.

A reader is of one recording. It reads several continuations side by side and keeps one of them, cut anywhere, which is
what a verifier of drafts needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone
from tokenthrift.backbones.whisper_decoder import WhisperDecoder, WhisperDecoderBackbone
from tokenthrift.budget import BudgetError
from tokenthrift.padding import pad_rows

if TYPE_CHECKING:  # transformers is slow to import, and Whisper's decoder needs none of it
    from tokenthrift.backbones.prefix import PrefixBackbone

__all__ = ["CausalReader", "WhisperReader", "causal_readers", "check_causal"]


class CausalReader(Protocol):
    """Reads the text of one recording from left to right.

    Attributes:
        vocab_size: tokens that there are.
        positions: most tokens that can be written.
        begin: tokens to read before the first of the text; the last of them predicts it.
    """

    vocab_size: int
    positions: int
    begin: list[int]

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Reads tokens after those that are kept.

        Args:
            continuations: at least one, of at least one token each; each is read as if it stood alone.

        Returns:
            `(n, vocab)` scores of what follows each token, for each continuation.
        """
        ...

    def keep(self, continuation: int, count: int) -> None:
        """Keeps the first `count` tokens of one continuation of the last `read`, and forgets the others."""
        ...


class WhisperReader:
    """A `CausalReader` over Whisper's decoder.

    Args:
        decoder: the decoder.
        context: of one recording.
        begin: tokens before the text.
    """

    def __init__(self, decoder: WhisperDecoder, context: Context, begin: Sequence[int]) -> None:
        self.decoder, self.context, self.begin = decoder, context, list(begin)
        self.vocab_size = decoder.embed_tokens.num_embeddings
        self.positions = decoder.embed_positions.num_embeddings - len(self.begin) + 1
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._read: list[tuple[Tensor, Tensor]] = []

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `CausalReader.read`."""
        device, count = self.context.mask.device, len(continuations)
        ids = pad_rows([torch.tensor(tokens) for tokens in continuations])[0].to(device)
        past = 0 if self._kept is None else self._kept[0][0].shape[2]
        width = ids.shape[1]
        seen = None
        if width > 1:  # a single token looks at everything before it
            seen = torch.ones(width, past + width, dtype=torch.bool, device=device).tril(past)
        context, kept = self.context, self._kept
        if count > 1:
            context = context.select(torch.zeros(count, dtype=torch.int64, device=device))
            if kept is not None:
                kept = [(key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)) for key, value in kept]
        hidden, self._read = self.decoder(ids, seen, context, kept)
        logits = self.decoder.logits(hidden)
        return [row[: len(tokens)] for row, tokens in zip(logits, continuations, strict=True)]

    def keep(self, continuation: int, count: int) -> None:
        """See `CausalReader.keep`."""
        past = 0 if self._kept is None else self._kept[0][0].shape[2]
        row = slice(continuation, continuation + 1)
        self._kept = [(key[row, :, : past + count], value[row, :, : past + count]) for key, value in self._read]


def check_causal(backbone: MaskedDiffusionBackbone, family: str) -> None:
    """Raises a BudgetError for a language model that has no causal reading."""
    if isinstance(backbone, WhisperDecoderBackbone):
        return
    from tokenthrift.backbones.language_models import DECODERS

    if cast("PrefixBackbone", backbone).lm.config.model_type not in DECODERS:
        raise BudgetError(
            f'certify="ar" with a {family} language model, which has no left-to-right reading',
            f"certify with whisper, {', '.join(DECODERS)}",
            "no certify",
        )


def causal_readers(backbone: MaskedDiffusionBackbone, memory: Tensor, memory_mask: Tensor) -> list[CausalReader]:
    """A reader for each recording; see `check_causal` for what has none.

    Args:
        backbone: the language model.
        memory: `(B, N, memory_size)`.
        memory_mask: `(B, N)`.
    """
    if isinstance(backbone, WhisperDecoderBackbone):
        context, begin = backbone.context(memory, memory_mask), backbone.start.tolist()
        rows = torch.arange(len(memory), device=memory.device)
        return [WhisperReader(backbone.decoder, context.select(rows[i : i + 1]), begin) for i in range(len(memory))]
    from tokenthrift.dllm_asr.prefix_reading import prefix_readers

    return list(prefix_readers(cast("PrefixBackbone", backbone), memory, memory_mask))
