"""A prompt of text and media, and what becomes of it: rows of embeddings for a language model.

Source: the interleaved prompts of Flamingo (arXiv 2204.14198) and LLaVA. What differs: every medium has a budget, and
no placeholder tokens stand in the text, so that what is reduced needs no bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from tokenthrift.budget import TokenUsage
from tokenthrift.tokens import TokenBatch

__all__ = ["Answer", "Media", "Prepared", "Prompt"]


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A picture, a clip or a recording in a prompt.

    Attributes:
        kind: image, video, audio or lips.
        value: what the system of that kind encodes (a picture (3, H, W), a clip (T, 3, H, W), samples (n,)), or a
            `TokenBatch` of one item that it has encoded.
        weight: how much it counts beside others, where a window is shared by value.
    """

    kind: str
    value: Tensor | TokenBatch | Any
    weight: float = 1.0


Prompt: TypeAlias = Sequence[str | Media]
"""Text and media in reading order."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Prompts as a language model reads them.

    Attributes:
        rows: (L_i, H) embeddings of each prompt, without padding.
        usage: of the media of each prompt, in order.
    """

    rows: list[Tensor]
    usage: list[tuple[TokenUsage, ...]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, and what the media of its prompt used."""

    text: str
    usage: tuple[TokenUsage, ...]
