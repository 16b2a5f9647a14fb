"""What a speech recogniser gives back, and the one protocol through which the batch job calls it.

Every recogniser of the package (and any fake one in a test) is used only through :class:`Recogniser`, so the job that
reads files, cuts windows and writes subtitles knows nothing about the model behind it. Plain dataclasses, as in
faster-whisper's public surface; unlike there, every token carries its confidence and every transcript what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tokenthrift.budget import BudgetSupport, DecodeBudget, TokenBudget, TokenUsage

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["AudioVisualRecogniser", "Recogniser", "Transcript", "TranscriptToken"]


@dataclass(frozen=True, slots=True)
class TranscriptToken:
    """One written piece of a transcript.

    Attributes:
        text: The piece as written, with its leading space, so that joining all pieces gives the text (up to strip).
        confidence: Probability in [0, 1] that the recogniser gave the piece when it fixed it.
        start: Seconds from the start of the audio given, or None where the recogniser cannot tell.
        end: Seconds from the start of the audio given, never before ``start``, or None with it.
    """

    text: str
    confidence: float
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Transcript:
    """The text of one piece of audio, its pieces in order, and what it cost.

    Attributes:
        text: The whole text, without surrounding space; empty for silence.
        tokens: The written pieces of ``text`` in order.
        usage: Native, cap and used tokens and the denoising rounds spent.
    """

    text: str
    tokens: tuple[TranscriptToken, ...]
    usage: TokenUsage


@runtime_checkable
class Recogniser(Protocol):
    """Audio in, transcripts out; the result of an item never depends on its neighbours in the batch."""

    @property
    def sample_rate(self) -> int:
        """Samples per second that ``transcribe`` expects."""
        ...

    @property
    def max_seconds(self) -> float:
        """The longest audio that one item may hold."""
        ...

    def transcribe(self, audio: Sequence[Tensor], budget: DecodeBudget | None = None) -> list[Transcript]:
        """Transcribe a batch.

        Args:
            audio: One (samples,) float32 mono tensor per item at ``sample_rate``, any lengths up to ``max_seconds``.
            budget: Ceilings for every item; None means the recogniser's own defaults.

        Returns:
            One transcript per item, in the order given.
        """
        ...


@runtime_checkable
class AudioVisualRecogniser(Protocol):
    """Sound, lips or both in, transcripts out, at a price in tokens; as :class:`Recogniser` otherwise."""

    @property
    def support(self) -> BudgetSupport:
        """Which token budgets are honoured."""
        ...

    @property
    def sample_rate(self) -> int:
        """Samples per second that ``transcribe`` expects."""
        ...

    @property
    def frame_rate(self) -> int:
        """Pictures per second that ``transcribe`` expects."""
        ...

    @property
    def max_seconds(self) -> float:
        """The longest that one item may be."""
        ...

    def accepts(self, *, audio: bool, video: bool) -> bool:
        """Whether an item with these streams, or some of them, can be transcribed."""
        ...

    def read_lips(self, path: Path) -> Tensor | None:
        """The lips in a file at ``frame_rate``, (T, H, W), or None for a file without pictures.

        Raises:
            ValueError: There are pictures, and no face in them.
        """
        ...

    def check_price(self, samples: int, frames: int, budget: TokenBudget) -> None:
        """Raises BudgetError where an item of so many samples and frames (0 without) cannot have what it costs."""
        ...

    def transcribe(
        self,
        audio: Sequence[Tensor | None],
        video: Sequence[Tensor | None],
        budget: TokenBudget | None = None,
        *,
        decode: DecodeBudget | None = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
    ) -> list[Transcript]:
        """Transcribe a batch.

        Args:
            audio: One (samples,) float32 mono tensor per item, or None where there is no sound.
            video: One (T, H, W) tensor of lips per item, or None where there are none.
            budget: Ceilings in tokens for every item; None means whatever writes best.
            decode: Ceilings for every text.
            coarse_to_fine: Pay for detail only where the cheapest rates leave the text unsure.
            noise_aware: Choose rates by the noise of the item.

        Returns:
            One transcript per item, in the order given.
        """
        ...
