"""Training of the autoregressive baseline under Lightning: the data, optimizer and schedule of `DllmAsrModule`.

Source: the comparison of dLLM-ASR (arXiv 2601.17902) with Whisper-LLaMA3; its training is not published.
"""

from __future__ import annotations

from torch import Tensor

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.dllm_asr.autoregressive import decoder_of, greedy, next_token_loss
from tokenthrift.dllm_asr.training.batch import Batch
from tokenthrift.dllm_asr.training.module import DllmAsrModule, ValidationRow

__all__ = ["AutoregressiveModule"]


class AutoregressiveModule(DllmAsrModule):
    """Trains Whisper's decoder left to right."""

    @property
    def decoder(self) -> WhisperDecoder:
        """The decoder that the denoiser would use."""
        return decoder_of(self.model)

    def setup(self, stage: str) -> None:
        """Freezes what only the denoiser uses: data-parallel training refuses parameters without a gradient."""
        for name, parameter in self.model.backbone.named_parameters():
            if not name.startswith("decoder."):
                parameter.requires_grad_(False)

    def denoising_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy of the next token, and the tokens that this is the mean of."""
        vocabulary = self.model.vocabulary
        longest = self.decoder.embed_positions.num_embeddings - 1
        texts = [[t for w in text.split() for t in vocabulary.word(w)][:longest] for text in batch.texts]
        memory, mask = self.memory(batch, self.rates(batch))
        loss = next_token_loss(self.decoder, memory, mask, texts, vocabulary)
        return loss, sum(len(text) + 1 for text in texts)

    def validated(self, batch: Batch) -> list[ValidationRow]:
        """Greedy transcripts of one batch."""
        vocabulary = self.model.vocabulary
        memory, mask = self.model.adapter(batch.states, batch.lengths)
        rows = greedy(self.decoder, memory, mask, vocabulary)
        return [
            ValidationRow(text, "", vocabulary.text(row), len(row) + 1)
            for text, row in zip(batch.texts, rows, strict=True)
        ]
