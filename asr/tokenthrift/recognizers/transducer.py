"""Transducers: Parakeet TDT (token and duration) and RNN-T, by transformers' own greedy decoding.

Source: Graves 2012 (RNN-T) and Xu et al. 2023 (arXiv 2304.06795, TDT). A token starts at the frame where it is emitted
and lasts as long as the model says (TDT) or one frame (RNN-T).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import ConfidenceRecorder, TransformersRecognizer, text_pieces, usage_of
from tokenthrift.transcript import Transcript, TranscriptToken

__all__ = ["TransducerRecognizer"]


class TransducerRecognizer(TransformersRecognizer):
    """A `Recognizer` of a transducer."""

    gives_times = True

    @property
    def blank(self) -> int:
        """The id of the transducer's blank."""
        return int(self.model.config.blank_token_id)

    def native_tokens(self, samples: int) -> int:
        """Encoder frames."""
        frames = torch.tensor([samples // int(self.features.hop_length)])
        return max(1, int(self.model._get_subsampling_output_length(frames)[0]))

    def transcribe_rows(self, audio: Sequence[Tensor], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of one length."""
        inputs = self.features(
            [samples.numpy() for samples in audio], sampling_rate=self.sample_rate, return_tensors="pt"
        )
        recorder = ConfidenceRecorder(int(self.model.config.vocab_size))
        starts = self.model.generation_config
        known = starts.decoder_start_token_id is not None or starts.bos_token_id is not None
        out = self.model.generate(
            **({} if known else {"decoder_start_token_id": self.blank}),
            **self.moved({name: inputs[name] for name in ("input_features", "attention_mask")}),
            logits_processor=[recorder],
            # Every frame may hold several tokens and a blank; the encoder's end stops it long before.
            max_new_tokens=(int(self.model.max_symbols_per_step) + 1) * self.native_tokens(len(audio[0])),
            do_sample=False,
            num_beams=1,
        )
        # The first entry is the start token, which no step gave.
        rows = zip(out.sequences[:, 1:].tolist(), out.durations[:, 1:].tolist(), audio, strict=True)
        return [
            self._transcript(ids, advances, recorder.row(i), len(samples))
            for i, (ids, advances, samples) in enumerate(rows)
        ]

    def _transcript(self, ids: list[int], advances: list[int], confidences: list[float], samples: int) -> Transcript:
        frames = self.native_tokens(samples)
        seconds = samples / self.sample_rate
        step = seconds / frames
        kept: list[tuple[int, float, int, int]] = []
        at = 0
        for token, advance, p in zip(ids, advances, confidences, strict=True):
            # Rows that end before the longest one go on with padding.
            if at >= frames:
                break
            if token != self.blank:
                kept.append((token, p, at, at + max(1, advance)))
            at += advance
        pieces = text_pieces(self.tokenizer, [token for token, *_ in kept])
        tokens = tuple(
            TranscriptToken(piece, min(1.0, p), min(first * step, seconds), min(last * step, seconds))
            for piece, (_, p, first, last) in zip(pieces, kept, strict=True)
            if piece
        )
        return Transcript("".join(pieces).strip(), tokens, usage_of(self.native_tokens(samples), len(kept)))
