"""Word and character error rates over a whole corpus, after Whisper's English normalizer.

The rate of a corpus is all its errors over all its reference words (Radford et al. 2022, section 3.2 and appendix C:
the normalizer spells numbers, contractions, titles and spellings in one way, and drops fillers and what stands in
brackets). A mean of the rates of single clips, as some scripts print, weighs a word of a short clip more. Alignment is
jiwer's, the normalizer openai-whisper's; both belong to the `evaluation` extra and are imported at first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from tokenthrift import extras
from tokenthrift.lazy import deprecated

__all__ = ["ErrorCount", "character_errors", "normalize_english", "word_errors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCount:
    """Edits that turn hypotheses into references, counted in words or in characters; counts of two sets can be added.

    Attributes:
        hits: Units that are right.
        substitutions: Units that are another one.
        deletions: Units of the reference that are missing.
        insertions: Units that are in no reference.
    """

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def total(self) -> int:
        """Units of the references."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors over units of the references: above 1 where much is invented, infinite where there was nothing to say
        and something was said, and 0 where both are empty."""
        if self.total:
            return self.errors / self.total
        return float("inf") if self.errors else 0.0

    def __add__(self, other: ErrorCount) -> ErrorCount:
        return ErrorCount(
            hits=self.hits + other.hits,
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
        )


def normalize_english(text: str) -> str:
    """Whisper's English form of a text: lower case, no punctuation, numbers as digits, one spelling.

    Raises:
        MissingExtraError: openai-whisper is not installed; the message says how to get it.
    """
    return _normalizer()(text)


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] = normalize_english
) -> ErrorCount:
    """Word errors of a corpus.

    Args:
        references: What was said, one text per recording; an empty one counts every word written as an insertion.
        hypotheses: What was written, in the same order.
        normalize: Applied to both sides; `str` compares them as they are.

    Raises:
        ValueError: The two are not equally long.
    """
    return _errors("process_words", references, hypotheses, normalize)


def character_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalize: Callable[[str], str] = normalize_english
) -> ErrorCount:
    """Character errors of a corpus, spaces counted; arguments and errors as in `word_errors`."""
    return _errors("process_characters", references, hypotheses, normalize)


def _errors(
    process: str, references: Iterable[str], hypotheses: Iterable[str], norm: Callable[[str], str]
) -> ErrorCount:
    said, written = [norm(text) for text in references], [norm(text) for text in hypotheses]
    if len(said) != len(written):
        raise ValueError(f"{len(said)} references but {len(written)} hypotheses")
    if not said:
        return ErrorCount()
    found = getattr(extras.require("jiwer"), process)(said, written)
    return ErrorCount(
        hits=found.hits, substitutions=found.substitutions, deletions=found.deletions, insertions=found.insertions
    )


@lru_cache(maxsize=1)
def _normalizer() -> Callable[[str], str]:
    return cast(Callable[[str], str], extras.require("whisper.normalizers").EnglishTextNormalizer())


__getattr__ = deprecated(__name__, {"normalise_english": "normalize_english"})
