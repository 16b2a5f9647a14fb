"""Encoder-decoders other than Whisper: Moonshine, SpeechT5, SeamlessM4T and all that `AutoModelForSpeechSeq2Seq` loads.

Greedy decoding by transformers' `generate`, with the probability of every choice. These models give no times; the batch
job aligns their words where it is given a CTC model (`transcription.alignment`). Moonshine's authors stop at 6.5 tokens
a second against endless repetition; the limit here is twice that, for tokenizers of other languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import ConfidenceRecorder, Parts, TransformersRecognizer
from tokenthrift.transcript import Transcript

__all__ = ["Seq2SeqRecognizer", "generated_rows"]

_ENGLISH = "eng"


class Seq2SeqRecognizer(TransformersRecognizer):
    """A `Recognizer` of an encoder-decoder.

    SeamlessM4T writes in the language of its prompt, which is the one spoken or English; without one it writes words
    of any.

    Args:
        parts: model, features, tokenizer.
        language: of the speech, as the model names it, where it takes one.
        task: "transcribe", or "translate" into English where the model can.

    Raises:
        ValueError: the model takes no language, needs one, or does not know this one; or it does not translate.
    """

    decode_fields = frozenset({"max_new_tokens"})

    def __init__(self, parts: Parts, *, language: str | None = None, task: str = "transcribe") -> None:
        generation = parts.model.generation_config
        self._languages: dict[str, Any] = getattr(generation, "text_decoder_lang_to_code_id", None) or {}
        super().__init__(parts, language=language, task=task)
        self._target = _ENGLISH if task == "translate" else language
        if self._languages and not {self._target, language or self._target} <= self._languages.keys():
            raise ValueError(f"language={language!r}: this model wants one of {', '.join(sorted(self._languages))}")

    @property
    def takes_language(self) -> bool:
        """Models of several languages do."""
        return bool(self._languages)

    @property
    def translates(self) -> bool:
        """Those that know English among others do."""
        return _ENGLISH in self._languages

    def native_tokens(self, samples: int) -> int:
        """Encoder states."""
        lengths = getattr(self.model, "_get_feat_extract_output_lengths", None)
        if lengths is not None and self.features.model_input_names[0] == "input_values":
            return max(1, int(torch.as_tensor(lengths(torch.tensor([samples]))).reshape(-1)[0]))
        return max(1, round(samples / self._samples_per_state))

    @cached_property
    def _samples_per_state(self) -> float:
        """Measured once on a second of silence: each model has a formula of its own."""
        silence = torch.zeros(self.sample_rate)
        inputs = self._inputs([silence])
        with torch.inference_mode():
            states = self.model.get_encoder()(**inputs).last_hidden_state
        return self.sample_rate / max(1, int(states.shape[1]))

    def _inputs(self, audio: Sequence[Tensor]) -> dict[str, Tensor]:
        inputs = self.features(
            [samples.numpy() for samples in audio],
            sampling_rate=self.sample_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return self.moved(inputs)

    def transcribe_rows(self, audio: Sequence[Tensor], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of one length."""
        samples, recorder = len(audio[0]), ConfidenceRecorder()
        native = self.native_tokens(samples)
        sequences = self.model.generate(
            **self._inputs(audio),
            **({"tgt_lang": self._target} if self._languages else {}),
            max_new_tokens=self.most_tokens(samples, limits),
            do_sample=False,
            num_beams=1,
            logits_processor=[recorder],
        )
        rows = generated_rows(sequences, recorder, self.model.generation_config.eos_token_id)
        return [self.written(ids, confidences, native) for ids, confidences in rows]


def generated_rows(
    sequences: Tensor, recorder: ConfidenceRecorder, end: int | Sequence[int] | None
) -> list[tuple[list[int], list[float]]]:
    """The tokens that `generate` wrote in each row, up to the end token, and their probabilities.

    Args:
        sequences: `(B, prompt + steps)`.
        recorder: of the steps.
        end: the ids that end a text.
    """
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    rows = []
    for i, row in enumerate(sequences[:, sequences.shape[1] - len(recorder.steps) :].tolist()):
        length = next((at for at, token in enumerate(row) if token in ends), len(row))
        rows.append((row[:length], recorder.row(i)[:length]))
    return rows
