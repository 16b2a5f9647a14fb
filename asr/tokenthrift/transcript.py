"""What a speech recognizer gives back, and the protocols through which the batch job calls it.

Every recognizer of the package (and any fake one in a test) is used only through `Recognizer` or
`AudioVisualRecognizer`, so the job that reads files, cuts windows and writes subtitles knows nothing about the model
behind it. Plain dataclasses, as in faster-whisper's public surface; unlike there, every token carries its confidence
and every transcript what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeLike, SizeLike, TokenUsage
from tokenthrift.lazy import deprecated

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["AudioVisualRecognizer", "Recognizer", "Transcript", "TranscriptToken", "Word"]

__getattr__ = deprecated(__name__, {"AudioVisualRecogniser": "AudioVisualRecognizer", "Recogniser": "Recognizer"})


@dataclass(frozen=True, slots=True)
class TranscriptToken:
    """One written piece of a transcript.

    Attributes:
        text: The piece as written, with its leading space, so that joining all pieces gives the text (up to strip).
        confidence: Probability in [0, 1] that the recognizer gave the piece when it committed it.
        start: Seconds from the start of the audio given, or None where the recognizer gives no times.
        end: Seconds from the start of the audio given, never before ``start``, or None with it.
    """

    text: str
    confidence: float
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a transcript and when it is spoken.

    Attributes:
        text: The word as written, with the marks that belong to it and without space.
        start: Seconds from the start of the audio given; starts and ends never go back from word to word.
        end: Seconds from the start of the audio given, never before ``start``.
        confidence: Probability in [0, 1] that the recognizer gives the word.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """The text of one piece of audio, its pieces in order, and what it cost.

    Attributes:
        text: The whole text, without surrounding space; empty for silence.
        tokens: The written pieces of ``text`` in order.
        usage: Native, cap and used tokens and the denoising rounds spent.
        words: The words of ``text`` in order, or empty where the recognizer gives no times.
        alternatives: Other texts for the same audio, the likeliest first, where several were asked for.
    """

    text: str
    tokens: tuple[TranscriptToken, ...]
    usage: TokenUsage
    words: tuple[Word, ...] = ()
    alternatives: tuple[str, ...] = ()


@runtime_checkable
class Recognizer(Protocol):
    """Audio in, transcripts out; the result of an item never depends on its neighbors in the batch."""

    @property
    def support(self) -> BudgetSupport:
        """Which token budgets are honored."""
        ...

    @property
    def sample_rate(self) -> int:
        """Samples per second that `transcribe` expects."""
        ...

    @property
    def max_seconds(self) -> float:
        """The longest audio that one item may hold."""
        ...

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """What items of so many seconds will use; raises BudgetError where a budget cannot be honored."""
        ...

    def transcribe(
        self,
        audio: Sequence[Tensor],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        decode: DecodeLike = None,
    ) -> list[Transcript]:
        """Transcribe a batch.

        Args:
            audio: One (samples,) float32 mono tensor per item at `sample_rate`, any lengths up to `max_seconds`.
            budget: Ceilings in tokens for every item, or a list with one for each; None sets none.
            decode: Limits of decoding for every item; None means the recognizer's own.

        Returns:
            One transcript per item, in the order given.
        """
        ...


@runtime_checkable
class AudioVisualRecognizer(Protocol):
    """Sound, lips or both in, transcripts out; as `Recognizer` otherwise."""

    @property
    def support(self) -> BudgetSupport:
        """Which token budgets are honored."""
        ...

    @property
    def sample_rate(self) -> int:
        """Samples per second that `transcribe` expects."""
        ...

    @property
    def frame_rate(self) -> int:
        """Pictures per second that `transcribe` expects."""
        ...

    @property
    def max_seconds(self) -> float:
        """The longest that one item may be."""
        ...

    def accepts(self, *, audio: bool, video: bool) -> bool:
        """Whether an item with these streams, or some of them, can be transcribed."""
        ...

    def read_lips(self, path: Path) -> Tensor | None:
        """The lips in a file at `frame_rate`, (T, H, W), or None for a file without pictures.

        Raises:
            ValueError: There are pictures, and no face in them.
        """
        ...

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """What items will use: of so many seconds of sound, frames of lips, or both.

        Raises:
            BudgetError: A budget cannot be honored.
        """
        ...

    def transcribe(
        self,
        audio: Sequence[Tensor | None],
        video: Sequence[Tensor | None],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        *,
        decode: DecodeLike = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
    ) -> list[Transcript]:
        """Transcribe a batch.

        Args:
            audio: One (samples,) float32 mono tensor per item, or None where there is no sound.
            video: One (T, H, W) tensor of lips per item, or None where there are none.
            budget: Ceilings in tokens for every item, or a list with one for each; None means the rates of the lowest
                error.
            decode: Limits of decoding for every item.
            coarse_to_fine: Use finer rates only for items whose text has a low confidence at the coarsest rates.
            noise_aware: Choose rates by the noise of the item.

        Returns:
            One transcript per item, in the order given.
        """
        ...
