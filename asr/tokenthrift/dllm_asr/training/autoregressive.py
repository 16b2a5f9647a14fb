"""Training of the autoregressive baseline under Lightning: the data, optimizer and schedule of `DllmAsrModule`.

Source: the comparison of dLLM-ASR (arXiv 2601.17902) with Whisper-LLaMA3; its training is not published.
"""

from __future__ import annotations

from torch import Tensor

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy, left_to_right_loss
from tokenthrift.dllm_asr.training.data import Batch
from tokenthrift.dllm_asr.training.module import DllmAsrModule

__all__ = ["AutoregressiveModule"]


class AutoregressiveModule(DllmAsrModule):
    """Trains Whisper's decoder left to right, with the data, optimiser and schedule of `DllmAsrModule`."""

    @property
    def decoder(self) -> WhisperDecoder:
        """The decoder that the denoiser would use."""
        return decoder_of(self.model)

    def denoising_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of the next token."""
        vocabulary = self.model.vocabulary
        longest = self.decoder.embed_positions.num_embeddings - 1
        texts = [[t for w in text.split() for t in vocabulary.word(w)][:longest] for text in batch.texts]
        memory, mask = self.model.adapter(batch.states, batch.lengths)
        return left_to_right_loss(self.decoder, memory, mask, texts, vocabulary)

    def validation_step(self, batch: Batch, index: int, dataloader_idx: int = 0) -> None:
        """Greedy transcripts of one batch."""
        vocabulary = self.model.vocabulary
        memory, mask = self.model.adapter(batch.states, batch.lengths)
        heard = self.heard.setdefault(dataloader_idx, [])
        for text, row in zip(batch.texts, greedy(self.decoder, memory, mask, vocabulary), strict=True):
            heard.append((text, "", vocabulary.text(row), len(row) + 1))
