"""The causal reading of the language model that denoises: the same weights, left to right, with keys and values kept.

Source: what a decoder writes left to right is the baseline of dLLM-ASR (arXiv 2601.17902). Here it is a second reading
of one network: Whisper's decoder with its causal mask; a Llama-like decoder is read by `prefix_reading`.

A reader is of one recording. It reads several continuations side by side and keeps one of them, cut anywhere, which is
what a verifier of drafts needs. `BatchReader` reads those of several recordings in one pass, each at its own length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone
from tokenthrift.backbones.whisper_decoder import Cache, WhisperDecoder, WhisperDecoderBackbone
from tokenthrift.budget import BudgetError
from tokenthrift.padding import pad_rows

if TYPE_CHECKING:  # transformers is slow to import, and Whisper's decoder needs none of it
    from tokenthrift.backbones.prefix import PrefixBackbone

__all__ = ["BatchReader", "CausalReader", "ReadTogether", "WhisperReader", "causal_readers", "check_causal"]


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


ReadTogether = Callable[[Sequence[CausalReader], Sequence[Sequence[Sequence[int]]]], list[list[Tensor]]]
"""(readers, continuations of each) -> scores of each, as `CausalReader.read` gives them."""


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
        nothing = [state[:, :, :0] for state in context.states]
        self.past: Cache = list(zip(nothing[::2], nothing[1::2], strict=True))
        """Keys and values `(1, heads, kept, width)` of the tokens that are kept, layer by layer."""
        self._read: Cache = []

    @property
    def kept(self) -> int:
        """Tokens that are kept."""
        return self.past[0][0].shape[2]

    def read(self, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `CausalReader.read`."""
        device, count, kept = self.context.mask.device, len(continuations), self.kept
        ids = pad_rows([torch.tensor(tokens) for tokens in continuations])[0].to(device)
        width = ids.shape[1]
        seen = None
        if width > 1:  # a single token looks at everything before it
            seen = torch.ones(width, kept + width, dtype=torch.bool, device=device).tril(kept)
        context, past = self.context, self.past
        if count > 1:
            context = Context(
                context.mask.expand(count, -1), tuple(state.expand(count, -1, -1, -1) for state in context.states)
            )
            past = [(key.expand(count, -1, -1, -1), value.expand(count, -1, -1, -1)) for key, value in past]
        hidden, self._read = self.decoder(ids, seen, context, past if kept else None)
        logits = self.decoder.logits(hidden)
        return [row[: len(tokens)] for row, tokens in zip(logits, continuations, strict=True)]

    def received(self, new: Cache) -> None:
        """Takes the keys and values of continuations that `BatchReader` read, those of what was kept left out."""
        self._read = [
            (
                torch.cat([old_key.expand(len(key), -1, -1, -1), key], 2),
                torch.cat([old_value.expand(len(value), -1, -1, -1), value], 2),
            )
            for (old_key, old_value), (key, value) in zip(self.past, new, strict=True)
        ]

    def keep(self, continuation: int, count: int) -> None:
        """See `CausalReader.keep`."""
        row, end = slice(continuation, continuation + 1), self.kept + count
        self.past = [(key[row, :, :end], value[row, :, :end]) for key, value in self._read]


class BatchReader:
    """Reads for several recordings in one pass; a `ReadTogether`. Each row has keys, values and positions of its own.

    Where the same recordings are read again, what they attend to is not put together again.
    """

    def __init__(self) -> None:
        self._rows: list[WhisperReader] = []
        self._context: Context | None = None

    def __call__(
        self, readers: Sequence[CausalReader], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        """See `ReadTogether`."""
        if len(readers) == 1:
            return [readers[0].read(continuations[0])]
        if isinstance(readers[0], WhisperReader):  # all are of one model
            return self._whisper(cast("Sequence[WhisperReader]", readers), continuations)
        from tokenthrift.dllm_asr.prefix_reading import PrefixReader, read_prefixes

        return read_prefixes(cast("Sequence[PrefixReader]", readers), continuations)

    def _whisper(
        self, readers: Sequence[WhisperReader], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Tensor]]:
        decoder, device = readers[0].decoder, readers[0].context.mask.device
        rows = [reader for reader, own in zip(readers, continuations, strict=True) for _ in own]
        texts = [torch.tensor(tokens) for own in continuations for tokens in own]
        ids, real = (part.to(device) for part in pad_rows(texts))
        kept = torch.tensor([reader.kept for reader in rows], device=device)
        past, width = max(reader.kept for reader in rows), ids.shape[1]
        before = (torch.arange(past, device=device) < kept[:, None])[:, None].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(len(rows), -1, -1)
        positions = (kept[:, None] + torch.arange(width, device=device)).masked_fill(~real, 0)
        if len(rows) != len(self._rows) or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            contexts = [reader.context for reader in rows]
            states = tuple(torch.cat(parts) for parts in zip(*(context.states for context in contexts), strict=True))
            self._rows, self._context = rows, Context(torch.cat([context.mask for context in contexts]), states)
        assert self._context is not None
        caches = None
        if past:
            caches = [
                tuple(
                    torch.cat([F.pad(reader.past[layer][part], (0, 0, 0, past - reader.kept)) for reader in rows])
                    for part in (0, 1)
                )
                for layer in range(len(decoder.layers))
            ]
        seen = torch.cat([before, own], 2)[:, None]
        hidden, found = decoder(ids, seen, self._context, cast("Any", caches), positions=positions)
        logits, out, first = decoder.logits(hidden), [], 0
        for reader, texts_of_one in zip(readers, continuations, strict=True):
            here = slice(first, first + len(texts_of_one))
            reader.received([(key[here, :, past:], value[here, :, past:]) for key, value in found])
            out.append([row[: len(tokens)] for row, tokens in zip(logits[here], texts_of_one, strict=True)])
            first = here.stop
        return out


def check_causal(backbone: MaskedDiffusionBackbone, family: str) -> None:
    """Raises a BudgetError for a language model that has no causal reading, or no token before the text."""
    if isinstance(backbone, WhisperDecoderBackbone):
        return
    from tokenthrift.backbones.language_models import DECODERS

    lm = cast("PrefixBackbone", backbone)
    if lm.lm.config.model_type in DECODERS and not len(lm.prompt):
        raise BudgetError(
            'certify="ar" with a prompt that ends with the recording, so that no token comes before the text',
            "a backbone.prompt with text after {audio}",
            "no certify",
        )
    if lm.lm.config.model_type not in DECODERS:
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
        # Slices are views; `Context.select` would copy what the decoder attends to.
        rows = [slice(i, i + 1) for i in range(len(memory))]
        contexts = [Context(context.mask[row], tuple(state[row] for state in context.states)) for row in rows]
        return [WhisperReader(backbone.decoder, own, begin) for own in contexts]
    from tokenthrift.dllm_asr.prefix_reading import prefix_readers

    return list(prefix_readers(cast("PrefixBackbone", backbone), memory, memory_mask))
