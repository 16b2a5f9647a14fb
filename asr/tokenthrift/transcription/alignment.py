"""Times of words by forced alignment, for models that give none.

Source: Graves et al. 2006 (CTC); `torchaudio.functional.forced_align` finds the likeliest path of the written
characters through the log-probabilities of a CTC model. whisperX does the same with its own search and interpolates
over characters the model does not know; here such characters take no part, and a word of nothing else gets the time
between its neighbors. Where a text does not fit (more characters than frames), the time is shared out by characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tokenthrift import extras
from tokenthrift.transcript import Transcript, Word
from tokenthrift.words import match_tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Aligner", "align_words", "load_aligner"]


class CtcModel(Protocol):
    """What an aligner needs of a CTC model, such as `recognizers.CtcRecognizer`."""

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        ...

    @property
    def blank(self) -> int:
        """The id of the blank."""
        ...

    def log_probabilities(self, audio: Sequence[Tensor]) -> Tensor:
        """`(B, frames, vocabulary)` of recordings of one length."""
        ...


@dataclass(frozen=True, slots=True)
class Aligner:
    """Gives words their times.

    Attributes:
        model: of CTC over characters.
        characters: to ids; upper and lower case are tried.
    """

    model: CtcModel
    characters: dict[str, int]

    def align(self, audio: Tensor, rate: int, transcript: Transcript) -> tuple[Word, ...]:
        """Words of a transcript.

        Args:
            audio: `(samples,)` of the window that was transcribed.
            rate: its samples per second.
            transcript: its tokens give the confidences.

        Returns:
            As many words as the text has, times in order and inside the audio.
        """
        import torch

        seconds = len(audio) / rate
        if rate != self.model.sample_rate:
            audio = extras.require("torchaudio.functional").resample(audio, rate, self.model.sample_rate)
        with torch.inference_mode():
            log_p = self.model.log_probabilities([audio])[0]
        texts, groups = match_tokens(transcript.text, transcript.tokens)
        times = align_words(log_p, texts, self.characters, self.model.blank, seconds)
        return tuple(
            Word(text, start, end, confidence)
            for text, (start, end), confidence in zip(texts, times, _confidences(transcript, groups), strict=True)
        )


def load_aligner(source: str, device: str = "cpu", revision: str | None = None) -> Aligner:
    """An aligner of a character CTC model of transformers, such as wav2vec 2.0.

    Raises:
        ValueError: the model is of another kind, or its tokens are no characters.
        SourceError, ConfigError, WeightsError: as `recognizers.load_transformers`.
    """
    from tokenthrift.recognizers import CtcRecognizer, load_transformers

    model = load_transformers(source, device=device, revision=revision)
    vocabulary: dict[str, int] = model.tokenizer.get_vocab()
    characters = {token: index for token, index in vocabulary.items() if len(token) == 1 and token != "|"}
    if not isinstance(model, CtcRecognizer) or len(characters) < 2:
        raise ValueError(f"{source} cannot align: it is no CTC model over characters")
    return Aligner(model, characters)


def align_words(
    log_p: Tensor, texts: Sequence[str], characters: dict[str, int], blank: int, seconds: float
) -> list[tuple[float, float]]:
    """Start and end of every word in seconds, in order, none before 0 or after `seconds`.

    Args:
        log_p: `(frames, vocabulary)` log-probabilities over the whole audio.
        texts: words.
        characters: to ids.
        blank: the id of the blank.
        seconds: of the audio.
    """
    ids = [[i for c in text if (i := _id(c, characters)) is not None] for text in texts]
    targets = [i for word in ids for i in word]
    repeats = sum(a == b for a, b in zip(targets, targets[1:], strict=False))
    if not targets or len(targets) + repeats > len(log_p):
        return _shared(texts, seconds)
    import torch

    functional: Any = extras.require("torchaudio.functional")
    path, scores = functional.forced_align(log_p[None].contiguous(), torch.tensor([targets]), blank=blank)
    spans = functional.merge_tokens(path[0], scores[0].exp(), blank=blank)
    step = seconds / len(log_p)
    found: list[tuple[float, float] | None] = []
    at = 0
    for word in ids:
        part = spans[at : at + len(word)]
        at += len(word)
        found.append((part[0].start * step, part[-1].end * step) if part else None)
    return _filled(found, seconds)


def _id(character: str, characters: dict[str, int]) -> int | None:
    convert: Callable[[str], str]
    for convert in (str, str.upper, str.lower):
        if (found := characters.get(convert(character))) is not None:
            return found
    return None


def _shared(texts: Sequence[str], seconds: float) -> list[tuple[float, float]]:
    share = seconds / max(1, sum(len(text) for text in texts))
    times, at = [], 0.0
    for text in texts:
        times.append((min(at, seconds), min(at + share * len(text), seconds)))
        at += share * len(text)
    return times


def _filled(found: Sequence[tuple[float, float] | None], seconds: float) -> list[tuple[float, float]]:
    """Words without a time get the moment after the word before them; all in order."""
    times: list[tuple[float, float]] = []
    for pair in found:
        before = times[-1][1] if times else 0.0
        start, end = pair if pair is not None else (before, before)
        start = min(max(start, before), seconds)
        times.append((start, min(max(end, start), seconds)))
    return times


def _confidences(transcript: Transcript, groups: Sequence[range]) -> list[float]:
    """The least confidence of the tokens of each word; of all tokens where it is not known which are whose."""
    tokens = transcript.tokens
    return [
        min((token.confidence for token in tokens[group.start : group.stop] or tokens), default=1.0) for group in groups
    ]
