"""What the adapters of Whisper share, whoever computes: the languages they know and how much they read and write."""

from __future__ import annotations

from collections.abc import Sequence

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import Parts, TransformersRecognizer, text_pieces, usage_of
from tokenthrift.recognizers.whisper_vocabulary import WhisperVocabulary
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.whisper_frames import MAX_STATES

__all__ = ["WhisperBase"]


class WhisperBase(TransformersRecognizer):
    """A `Recognizer` of a Whisper; rows are padded to 30 s, as in training, so that any share a batch.

    Args:
        parts: model, features, tokenizer.
        vocabulary: its special tokens.
        language: of the speech; a code or an English name, None to find it.
        task: "transcribe", or "translate" into English.
    """

    decode_fields = frozenset({"max_new_tokens"})
    pads = True
    reads_sentences_alone = True
    gives_times = True

    def __init__(
        self, parts: Parts, vocabulary: WhisperVocabulary, *, language: str | None = None, task: str = "transcribe"
    ) -> None:
        self._vocabulary = vocabulary
        super().__init__(parts, language=language, task=task)
        if language is not None:
            self.language = vocabulary.code(language)

    @property
    def takes_language(self) -> bool:
        """Multilingual ones do."""
        return self._vocabulary.multilingual

    @property
    def translates(self) -> bool:
        """Multilingual ones do."""
        return self._vocabulary.multilingual

    def native_tokens(self, samples: int) -> int:
        """The encoder always reads 30 s."""
        return MAX_STATES

    def _most(self, samples: int, prompt: int, positions: int, limits: DecodeBudget) -> int:
        """Most tokens after a prompt of so many, in a decoder of so many positions."""
        # Whisper writes at most half of its positions, the other half is for a prompt.
        return min(positions - prompt - 1, positions // 2, self.most_tokens(samples, limits))

    def _timed(
        self, ids: Sequence[int], confidences: Sequence[float], times: Sequence[tuple[float, float]], samples: int
    ) -> Transcript:
        """A transcript of tokens with their start and end in seconds."""
        seconds = samples / self.sample_rate
        pieces = text_pieces(self.tokenizer, ids)
        tokens = tuple(
            TranscriptToken(piece, min(1.0, max(0.0, p)), min(start, seconds), min(end, seconds))
            for piece, p, (start, end) in zip(pieces, confidences, times, strict=True)
            if piece
        )
        return Transcript("".join(pieces).strip(), tokens, usage_of(self.native_tokens(samples), len(ids) + 1))
