"""What all adapters of transformers' speech models share: budgets, checks, and batches that equal single items.

A padded batch changes the text of many of these models: wav2vec 2.0 base and Moonshine normalize over all samples of a
row, padding included, and Granite's encoder has no mask (transformers' pipeline and the published scripts batch them
all the same). Here rows share a batch only if they are equally long, so that nothing is padded; Whisper's adapter pads
to one length itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tokenthrift.budget import (
    BudgetError,
    BudgetLike,
    BudgetSupport,
    DecodeBudget,
    DecodeLike,
    ItemSize,
    SizeLike,
    TokenBudget,
    TokenUsage,
    budgets_for,
    sizes_of,
)
from tokenthrift.transcript import Transcript, TranscriptToken

if TYPE_CHECKING:  # Whisper by CTranslate2 does not wait for PyTorch.
    import torch
    from torch import Tensor

__all__ = ["ConfidenceRecorder", "Parts", "TransformersRecognizer", "text_pieces", "usage_of"]

# Nobody speaks faster in any tokenizer, and a decoder that does not stop is stopped here.
_TOKENS_PER_SECOND = 13
_TOKENS_AT_LEAST = 16


@dataclass(frozen=True, slots=True)
class Parts:
    """A model of transformers and what turns audio and text into its numbers.

    Attributes:
        model: in evaluation mode, on its device.
        features: audio to what the model reads; a feature extractor or a processor.
        tokenizer: ids to text.
    """

    model: Any
    features: Any
    tokenizer: Any


class TransformersRecognizer(ABC):
    """A `Recognizer` made of a model of transformers.

    Args:
        parts: model, features, tokenizer.
        language: of the speech, where the model takes it.
        task: "transcribe", or "translate" into English where the model can.

    Raises:
        ValueError: the model takes no language, or does not translate.
    """

    decode_fields: ClassVar[frozenset[str]] = frozenset()
    pads: ClassVar[bool] = False
    takes_arrays: ClassVar[bool] = False
    reads_sentences_alone: ClassVar[bool] = False
    """Whether it reads a sentence better alone than in a window of several, see `transcription.rereading`."""
    gives_times: ClassVar[bool] = False
    """Whether words have times, so that they may be the draft of dLLM-ASR."""
    max_seconds = 30.0

    def __init__(self, parts: Parts, *, language: str | None = None, task: str = "transcribe") -> None:
        self.model, self.features, self.tokenizer = parts.model, parts.features, parts.tokenizer
        self.language, self.task = language, task
        name = type(self.model).__name__
        if language is not None and not self.takes_language:
            raise ValueError(f"language={language!r}: {name} takes no language")
        if task != "transcribe" and not self.translates:
            raise ValueError(f"task={task!r}: {name} only transcribes")

    @property
    def takes_language(self) -> bool:
        """Whether the language can be given."""
        return False

    @property
    def translates(self) -> bool:
        """Whether speech can be translated into English."""
        return False

    @property
    def support(self) -> BudgetSupport:
        """No ceiling is honored: the encoder gives one count for each length."""
        return BudgetSupport(fields=frozenset())

    @property
    def sample_rate(self) -> int:
        """Samples per second that `transcribe` expects."""
        extractor = getattr(self.features, "feature_extractor", self.features)
        return int(getattr(extractor, "sampling_rate", 16_000))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @abstractmethod
    def native_tokens(self, samples: int) -> int:
        """Encoder states that audio of so many samples becomes."""

    @abstractmethod
    def transcribe_rows(self, audio: Sequence[Any], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes rows that may share a batch, each as `prepare` gives it."""

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """Encoder states of items of so many seconds; exact.

        Raises:
            BudgetError: a ceiling is set, which none of these models honors, or no duration is known.
        """
        native = [
            self.native_tokens(max(1, round(item.require("seconds") * self.sample_rate)))
            if item.native is None
            else item.native
            for item in sizes_of(items)
        ]
        return self.support.plan(native, budget)

    def transcribe(
        self, audio: Sequence[Tensor], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        """Transcribes items; the result of each is that of the item alone.

        Args:
            audio: `(samples,)` each, mono at `sample_rate`, at most `max_seconds`.
            budget: no ceiling is honored.
            decode: limits of decoding; see `decode_fields` for those that are honored.

        Raises:
            BudgetError: a budget that the model does not honor, before anything runs.
            ValueError: an item has several channels, is empty or too long, or holds NaN; the message says which.
        """
        limits = DecodeBudget.parse(decode)
        chosen = [f.name for f in fields(limits) if getattr(limits, f.name) != f.default]
        for name in (name for name in chosen if name not in self.decode_fields):
            kind = type(self.model).__name__
            allowed = f"the fields {', '.join(sorted(self.decode_fields))}" if self.decode_fields else "no limit"
            raise BudgetError(f"{name}={getattr(limits, name)} for {kind}", allowed, f"no {name}")
        most = round(self.max_seconds * self.sample_rate)
        for i, samples in enumerate(audio):
            if samples.ndim != 1 or not 0 < len(samples) <= most:
                raise ValueError(
                    f"audio {i} must be one channel of 1 to {most} samples, not of shape {tuple(samples.shape)}"
                )
        prepared = [self.prepare(samples) for samples in audio]
        for i, samples in enumerate(prepared):
            if not bool(np.isfinite(np.asarray(samples)).all()):
                raise ValueError(f"audio {i} holds NaN or infinite samples")
        if any(limit != TokenBudget() for limit in budgets_for(budget, len(audio))):
            self.plan([ItemSize(seconds=len(samples) / self.sample_rate) for samples in audio], budget)
        results: dict[int, Transcript] = {}
        order = sorted(range(len(audio)), key=lambda i: len(audio[i]), reverse=True)
        groups = [order] if self.pads else [list(same) for _, same in groupby(order, key=lambda i: len(audio[i]))]
        with self.computing():
            for rows in groups:
                found = self.transcribe_rows([prepared[i] for i in rows], limits)
                results.update(zip(rows, found, strict=True))
        return [results[i] for i in range(len(audio))]

    def prepare(self, samples: Any) -> Any:
        """A recording as `transcribe_rows` wants it."""
        return samples.detach().float().cpu()

    def computing(self) -> AbstractContextManager[object]:
        """What holds while rows are transcribed."""
        import torch

        return torch.inference_mode()

    def moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors among the inputs on the model's device, numbers with a fraction in its precision."""
        from torch import Tensor

        dtype = next(self.model.parameters()).dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def most_tokens(self, samples: int, limits: DecodeBudget) -> int:
        """Most tokens that an autoregressive decoder writes for so many samples."""
        spoken = _TOKENS_AT_LEAST + -(-samples * _TOKENS_PER_SECOND // self.sample_rate)
        return spoken if limits.max_new_tokens is None else min(spoken, limits.max_new_tokens)

    def written(self, ids: Sequence[int], confidences: Sequence[float], native: int) -> Transcript:
        """A transcript of an autoregressive decoder's tokens, without times."""
        pieces = text_pieces(self.tokenizer, ids)
        tokens = tuple(
            TranscriptToken(piece, min(1.0, max(0.0, confidence)))
            for piece, confidence in zip(pieces, confidences, strict=True)
            if piece
        )
        return Transcript("".join(pieces).strip(), tokens, usage_of(native, len(ids) + 1))


class ConfidenceRecorder:
    """Logits processor of `generate` that notes how probable the greedy choice of every step is, and changes nothing.

    `generate` can return all scores instead, which is gigabytes for a batch of long texts.

    Args:
        vocab_size: entries of the logits that are tokens; those of a transducer also hold durations.
    """

    def __init__(self, vocab_size: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : self.vocab_size].float()
        self.steps.append((logits.max(-1).values - logits.logsumexp(-1)).exp())
        return scores

    def row(self, index: int) -> list[float]:
        """Probabilities of one row's choices."""
        import torch

        return torch.stack([step[index] for step in self.steps]).tolist() if self.steps else []


def usage_of(native: int, rounds: int) -> TokenUsage:
    """All native tokens used, in so many forward passes of what writes."""
    return TokenUsage(native=native, cap=native, used=native, rounds=rounds)


def text_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, the pieces are the decoded text.

    A token that completes nothing (part of a character, a special token) has an empty piece, and the next one gets it.
    """
    pieces: list[str] = []
    before = ""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if hasattr(tokenizer, "word_delimiter_token") or "group_tokens" in _decode_arguments(tokenizer):
        options["group_tokens"] = False
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:count]), **options)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids) or not text.startswith(before):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    whole = tokenizer.decode(list(ids), **options) if ids else ""
    if before != whole:
        # A tokenizer that rewrites what it has written: one piece for all.
        return [*[""] * (len(ids) - 1), whole]
    return pieces


def _decode_arguments(tokenizer: Any) -> tuple[str, ...]:
    code = getattr(getattr(type(tokenizer), "_decode", None), "__code__", None)
    return () if code is None else code.co_varnames
