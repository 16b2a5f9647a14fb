"""Models with a CTC head: wav2vec 2.0, HuBERT, WavLM, Data2Vec, Parakeet CTC and what else `AutoModelForCTC` loads.

Source: Graves et al. 2006 (CTC); the greedy path, repeats collapsed and blanks removed. Each token keeps its frames, so
words have times, and the posterior of its best frame, so they have confidences; transformers' own decoding keeps
neither unless asked for offsets. The log-probabilities are there for alignment and for drafts of dLLM-ASR.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import TransformersRecognizer, text_pieces, usage_of
from tokenthrift.transcript import Transcript, TranscriptToken

__all__ = ["CtcRecognizer", "collapse"]


class CtcRecognizer(TransformersRecognizer):
    """A `Recognizer` of a CTC model; one forward pass, no limit of decoding to honor."""

    gives_times = True

    @property
    def blank(self) -> int:
        """The id of the CTC blank."""
        return int(self.model.config.pad_token_id)

    def native_tokens(self, samples: int) -> int:
        """Frames of the log-probabilities."""
        import torch

        lengths = getattr(self.model, "_get_subsampling_output_length", None)
        lengths = lengths or self.model._get_feat_extract_output_lengths
        return max(1, int(lengths(torch.tensor([self._read(samples)]))[0]))

    def _read(self, samples: int) -> int:
        """What the network reads of so many samples: these, or frames of a spectrogram as the extractor counts them."""
        if "input_features" not in self.features.model_input_names:
            return samples
        silence = np.zeros(samples, dtype=np.float32)
        inputs = self.features([silence], sampling_rate=self.sample_rate, return_tensors="pt")
        mask = inputs.get("attention_mask")
        return int(inputs["input_features"].shape[1] if mask is None else mask[0].sum())

    def log_probabilities(self, audio: Sequence[Tensor]) -> Tensor:
        """Of recordings of one length: `(B, frames, vocabulary)`, natural logarithms, on the CPU."""
        inputs = self.features(
            [samples.numpy() for samples in audio], sampling_rate=self.sample_rate, return_tensors="pt"
        )
        logits: Tensor = self.model(**self.moved(inputs)).logits
        return logits.float().log_softmax(-1).cpu()

    def transcribe_rows(self, audio: Sequence[Tensor], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of one length."""
        native = self.native_tokens(len(audio[0]))
        return [
            self._transcript(row, len(samples), native)
            for row, samples in zip(self.log_probabilities(audio), audio, strict=True)
        ]

    def _transcript(self, log_p: Tensor, samples: int, native: int) -> Transcript:
        seconds = samples / self.sample_rate
        step = seconds / len(log_p)
        runs = collapse(log_p, self.blank)
        pieces = text_pieces(self.tokenizer, [token for token, *_ in runs])
        tokens = tuple(
            TranscriptToken(piece, p, first * step, min(seconds, last * step))
            for piece, (_, p, first, last) in zip(pieces, runs, strict=True)
            if piece
        )
        return Transcript("".join(pieces).strip(), tokens, usage_of(native, 1))


def collapse(log_p: Tensor, blank: int) -> list[tuple[int, float, int, int]]:
    """The greedy path of `(frames, vocabulary)` log-probabilities.

    Returns:
        Token, highest probability among its frames, first frame and the frame after its last, in order.
    """
    best, ids = log_p.max(-1)
    runs: list[tuple[int, float, int, int]] = []
    frame = 0
    for token, group in groupby(zip(ids.tolist(), best.exp().tolist(), strict=True), key=lambda pair: pair[0]):
        probabilities = [p for _, p in group]
        if token != blank:
            runs.append((int(token), min(1.0, max(probabilities)), frame, frame + len(probabilities)))
        frame += len(probabilities)
    return runs
