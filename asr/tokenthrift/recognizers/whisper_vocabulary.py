"""The special tokens of a Whisper: where a text starts and ends, languages, tasks, and what is never written.

Source: Radford et al. 2022 (arXiv 2212.04356), section 2.3. The names are those of openai-whisper's tokenizer, which
every published copy of the weights keeps; older copies call the token for silence `<|nocaptions|>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["WhisperVocabulary", "is_silence"]

_ENGLISH_ONLY = 51_865  # fewer tokens than this, and there are no languages
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_LIKELY_SILENCE = 0.6
_UNSURE = -1.0
_SILENCE = ("<|nospeech|>", "<|nocaptions|>")


@dataclass(frozen=True, slots=True)
class WhisperVocabulary:
    """Special tokens by name.

    Attributes:
        special: names to ids, ordinary tokens left out.
        size: how many tokens the model knows.
    """

    special: Mapping[str, int]
    size: int

    @property
    def multilingual(self) -> bool:
        """Whether it knows languages."""
        return self.size >= _ENGLISH_ONLY

    @property
    def languages(self) -> dict[str, int]:
        """Codes to ids."""
        return {found[1]: i for token, i in self.special.items() if (found := _LANGUAGE.fullmatch(token))}

    @property
    def silence(self) -> int | None:
        """The token that stands in place of a text where nobody speaks."""
        return next((self.special[name] for name in _SILENCE if name in self.special), None)

    def never(self, end: int, others: Collection[int] = ()) -> list[int]:
        """What no text holds: all special tokens but the end, timestamps, and others."""
        ids = {index for index in self.special.values() if index != end} | set(others)
        if (plain := self.special.get("<|notimestamps|>")) is not None:
            # Older files of tokenizers do not list timestamps, which are all that follow.
            ids |= set(range(plain + 1, self.size))
        return sorted(index for index in ids if 0 <= index < self.size)

    def code(self, language: str) -> str:
        """The code of a language that is given by code or by its English name.

        Raises:
            ValueError: the model does not know it.
        """
        known = self.languages
        code = language.strip().lower()
        if code not in known:
            from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

            code = str(TO_LANGUAGE_CODE.get(code, code))
        if code not in known:
            raise ValueError(f"language={language!r}: this Whisper knows {', '.join(sorted(known))}")
        return code

    def prompt(self, start: int, language: str | None, task: str) -> list[int | None]:
        """Start, language and task where there are any, no timestamps; None is a language that is to be found."""
        ids: list[int | None] = [self.special.get("<|startoftranscript|>", start)]
        if self.multilingual and (known := self.languages):
            ids.append(None if language is None else known[language])
            if (name := self.special.get(f"<|{task}|>")) is not None:
                ids.append(name)
        if (plain := self.special.get("<|notimestamps|>")) is not None:
            ids.append(plain)
        return ids


def is_silence(confidences: Sequence[float], silence: float) -> bool:
    """Whether a text was made up where nobody spoke; the rule and thresholds of openai-whisper's `transcribe`.

    Args:
        confidences: of the tokens of the text.
        silence: probability that the model gave to silence in place of a text.
    """
    mean = sum(math.log(max(p, 1e-9)) for p in confidences) / max(1, len(confidences))
    return silence > _LIKELY_SILENCE and mean < _UNSURE
