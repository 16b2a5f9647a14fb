"""The baseline: the same decoder over the same encoder and adapter, of the same size, left to right with a cache.

Source: the comparison that dLLM-ASR (arXiv 2601.17902) draws with Whisper-LLaMA3. The published baseline decodes one
recording at a time without optimization. This one caches keys and values, batches, and stops each recording at its end
of text, so that the comparison is fair.

It does not use `backbones.causal`: that is a language model which reads its input as a prefix of the text, while
Whisper's decoder reads it by cross-attention, whose keys and values are computed once per recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.backbones.whisper_decoder import WhisperDecoder, WhisperDecoderBackbone
from tokenthrift.dllm_asr.config import DllmAsrConfig, upgrade_version_1
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.hub import HubModel
from tokenthrift.padding import pad_rows

__all__ = ["AutoregressiveDecoder", "decoder_of", "greedy", "next_token_loss"]


class AutoregressiveDecoder(HubModel):
    """A causal Whisper decoder with the vocabulary of a `DllmAsr`, whose encoder and adapter it reads.

    Args:
        config: of the `DllmAsr`.
        vocabulary: words to tokens.
    """

    system: ClassVar[str] = "dllm_asr_autoregressive"
    config_class: ClassVar[type] = DllmAsrConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    config: DllmAsrConfig

    def __init__(self, config: DllmAsrConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config)
        self.vocabulary = vocabulary
        sizes = config.backbone
        self.decoder = WhisperDecoder(
            config.vocab_size,
            sizes.hidden_size,
            sizes.num_hidden_layers,
            sizes.num_attention_heads,
            sizes.intermediate_size,
            sizes.max_position_embeddings,
        )
        self.eval()

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """As `DllmAsr.upgrade_config`."""
        return upgrade_version_1(fields)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The vocabulary."""
        return {"vocabulary": Vocabulary.load(folder / "tokenizer.json")}

    def write_assets(self, folder: Path) -> None:
        """The vocabulary."""
        self.vocabulary.save(folder / "tokenizer.json")

    def decode(self, memory: Tensor, memory_mask: Tensor, limits: Sequence[int] | None = None) -> list[tuple[str, int]]:
        """Texts of a batch and the forward passes each took (its tokens and the end).

        Args:
            memory: `(B, N, hidden_size)`.
            memory_mask: `(B, N)`.
            limits: most tokens of each row, see `length_guard`.
        """
        rows = greedy(self.decoder, memory, memory_mask, self.vocabulary, limits)
        most = limits or [self.decoder.embed_positions.num_embeddings] * len(rows)
        return [
            (self.vocabulary.text(tokens), len(tokens) + (len(tokens) < limit))
            for tokens, limit in zip(rows, most, strict=True)
        ]


@torch.inference_mode()
def greedy(
    decoder: WhisperDecoder,
    memory: Tensor,
    memory_mask: Tensor,
    vocabulary: Vocabulary,
    limits: Sequence[int] | None = None,
) -> list[list[int]]:
    """Greedy decoding with cached keys and values.

    Args:
        decoder: the language model.
        memory: `(B, N, hidden_size)`.
        memory_mask: `(B, N)`.
        vocabulary: gives START and EOS; the other special tokens are never written.
        limits: most tokens of each row, see `length_guard`; the decoder's positions if not given.

    Returns:
        Tokens of each row without the end; a row that never ends is cut at its limit.
    """
    positions = decoder.embed_positions.num_embeddings
    most = torch.tensor([positions] * len(memory) if limits is None else list(limits), device=memory.device)
    context = decoder.context(memory, memory_mask)
    now = torch.full((len(memory), 1), vocabulary.start_id, device=memory.device)
    rows: list[list[int]] = [[] for _ in range(len(memory))]
    open_rows = most > 0
    past = None
    for step in range(min(positions, int(most.max())) if len(memory) else 0):
        hidden, past = decoder(now, None, context, past)
        logits = decoder.logits(hidden[:, -1])
        logits[:, [vocabulary.mask_id, vocabulary.start_id, vocabulary.delete_id]] = float("-inf")
        now = logits.argmax(-1, keepdim=True)
        open_rows &= (now[:, 0] != vocabulary.eos_id) & (step < most)
        if not bool(open_rows.any()):
            break
        for i in open_rows.nonzero().flatten().tolist():
            rows[i].append(int(now[i]))
    return rows


def next_token_loss(
    decoder: WhisperDecoder, memory: Tensor, memory_mask: Tensor, texts: list[list[int]], vocabulary: Vocabulary
) -> Tensor:
    """Mean cross-entropy of the next token, end of text included."""
    device, start, end = memory.device, vocabulary.start_id, vocabulary.eos_id
    inputs = pad_rows([torch.tensor([start, *t]) for t in texts], value=end)[0].to(device)
    targets, used = (part.to(device) for part in pad_rows([torch.tensor([*t, end]) for t in texts]))
    # Padding is on the right, so a causal mask already hides it from every real position.
    causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=device).tril()
    hidden, _ = decoder(inputs, causal, decoder.context(memory, memory_mask))
    return F.cross_entropy(decoder.logits(hidden[used]).float(), targets[used])


def decoder_of(model: DllmAsr) -> WhisperDecoder:
    """Whisper's decoder in a model whose backbone is made of it."""
    if not isinstance(model.backbone, WhisperDecoderBackbone):
        raise TypeError("the autoregressive baseline is made of Whisper's decoder; leave language_model out")
    return model.backbone.decoder
