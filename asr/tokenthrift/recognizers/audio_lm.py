"""Language models that take audio in their prompt: Granite Speech, Qwen2-Audio, Qwen3-ASR, Voxtral, GLM-ASR and others.

The prompt is the one that the model's own processor makes for transcription where it has one
(`apply_transcription_request`), else a chat turn of the audio and a sentence that asks for the words. Decoding is
greedy by transformers' `generate`. Rows share a batch only if they are equally long, because not every one of these
encoders honors a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import ConfidenceRecorder, TransformersRecognizer
from tokenthrift.recognizers.seq2seq import generated_rows
from tokenthrift.transcript import Transcript

__all__ = ["AudioLmRecognizer"]

PROMPT = "Transcribe the speech into written text. Write only the words that are said."


class AudioLmRecognizer(TransformersRecognizer):
    """A `Recognizer` of an audio language model; `features` is its processor."""

    decode_fields = frozenset({"max_new_tokens"})

    @property
    def sample_rate(self) -> int:
        """Samples per second that `transcribe` expects."""
        for name in ("feature_extractor", "audio_processor"):
            rate = getattr(getattr(self.features, name, None), "sampling_rate", None)
            if rate is not None:
                return int(rate)
        return 16_000

    @property
    def takes_language(self) -> bool:
        """Where the processor's own request for transcription takes one."""
        request = getattr(self.features, "apply_transcription_request", None)
        return request is not None and "language" in inspect.signature(request).parameters

    def native_tokens(self, samples: int) -> int:
        """Tokens of the prompt that stand for audio, counted by the processor."""
        return self._audio_tokens(self._inputs([torch.zeros(samples)]))

    def _audio_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Of one row; all of a batch have as many."""
        return max(1, int((inputs["input_ids"][0] == self._audio_id).sum()))

    @property
    def _audio_token(self) -> str:
        return str(getattr(self.features, "audio_token", "<|audio|>"))

    @property
    def _audio_id(self) -> int:
        config = self.model.config
        for name in ("audio_token_id", "audio_token_index"):
            if (found := getattr(config, name, None)) is not None:
                return int(found)
        return int(self.tokenizer.convert_tokens_to_ids(self._audio_token))

    def _inputs(self, audio: Sequence[Tensor]) -> dict[str, Any]:
        arrays = [samples.numpy() for samples in audio]
        request = getattr(self.features, "apply_transcription_request", None)
        if request is not None:
            known = inspect.signature(request).parameters
            options: dict[str, Any] = {}
            if self.language is not None:
                options["language"] = self.language
            if "sampling_rate" in known:
                options["sampling_rate"] = self.sample_rate
            if "model_id" in known:
                options |= {"model_id": self.model.name_or_path, "format": ["wav"] * len(arrays)}
            inputs = request(audio=arrays, **options)
        else:
            texts = [self._prompt()] * len(arrays)
            inputs = self.features(text=texts, audio=arrays, sampling_rate=self.sample_rate, return_tensors="pt")
        return self.moved(inputs)

    def _prompt(self) -> str:
        """A chat turn, in the form of the checkpoint's own template."""
        template = getattr(self.features, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            return f"{self._audio_token}{PROMPT}"
        # Templates that know audio expect a list of parts, and print the token; the others expect text.
        parts = [{"type": "audio", "audio": ""}, {"type": "text", "text": PROMPT}]
        for content in (parts, f"{self._audio_token}{PROMPT}"):
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}],
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            except Exception:  # A template is a program of the checkpoint and may raise anything for another content.
                continue
            if str(text).count(self._audio_token) == 1:
                return str(text)
        return f"{self._audio_token}{PROMPT}"

    def transcribe_rows(self, audio: Sequence[Tensor], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of one length."""
        samples = len(audio[0])
        recorder = ConfidenceRecorder()
        inputs = self._inputs(audio)
        sequences = self.model.generate(
            **inputs,
            max_new_tokens=self.most_tokens(samples, limits),
            do_sample=False,
            num_beams=1,
            logits_processor=[recorder],
        )
        end = self.model.generation_config.eos_token_id
        rows = generated_rows(sequences, recorder, self.tokenizer.eos_token_id if end is None else end)
        native = self._audio_tokens(inputs)
        return [self.written(ids, confidences, native) for ids, confidences in rows]
