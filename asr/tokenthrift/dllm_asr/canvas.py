"""The canvas: a CTC draft laid out in slots, from which the denoiser starts.

Source: dLLM-ASR (arXiv 2601.17902, section III-F) places a CTC transcript in the response; how the draft meets the mask
is not published. Here confident words are kept. The other words become open slots with some extra ones: the language
model fills slots that it does not need with DELETE, so a wrong length of the draft is repaired too. The draft's tokens
of an open slot stay as a hint, and every slot knows when its word is spoken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.padding import pad_rows

__all__ = ["ANYWHERE", "Canvas", "CanvasBatch", "build_canvas", "num_open_slots", "slot_windows", "stack_canvases"]

ANYWHERE = (0.0, math.inf)
"""The window of a slot whose time is not known."""


@dataclass(slots=True)
class Canvas:
    """The response a denoiser starts from, slot by slot.

    Attributes:
        ids: token, or MASK where the slot is open.
        confidence: posterior of the token, 0 where open.
        times: seconds of start and end; they never decrease.
        windows: when the word of the slot may be spoken, in seconds, see `slot_windows`.
        hints: the token that the draft had in an open slot, MASK where there is none.
    """

    ids: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)
    hints: list[int] = field(default_factory=list)

    def extend(
        self,
        ids: Sequence[int],
        hints: Sequence[int],
        confidence: float,
        start: float,
        end: float,
        *,
        open_end: bool = False,
    ) -> None:
        """Appends the slots of a word.

        Args:
            ids: tokens or MASK.
            hints: of the same length.
            confidence: of the word.
            start: of the word in seconds.
            end: of the word in seconds.
            open_end: the slots may be spoken at any time from `start`.
        """
        slots = len(ids)
        step = (end - start) / max(1, slots)
        self.ids += ids
        self.hints += hints
        self.confidence += [confidence] * slots
        self.times += [(start + i * step, start + (i + 1) * step) for i in range(slots)]
        self.windows += [(start, math.inf)] * slots if open_end else slot_windows(start, end, slots)

    def first(self, slots: int | None) -> Canvas:
        """The first `slots` slots; all of them where None."""
        return Canvas(
            self.ids[:slots], self.confidence[:slots], self.times[:slots], self.windows[:slots], self.hints[:slots]
        )


class CanvasBatch(NamedTuple):
    """Canvases side by side: `(B, L)` ids, mask of their slots and hints, `(B, L, 2)` windows in seconds."""

    ids: Tensor
    mask: Tensor
    windows: Tensor
    hints: Tensor


def stack_canvases(canvases: Sequence[Canvas], vocabulary: Vocabulary) -> CanvasBatch:
    """Pads canvases to the longest one: EOS without a hint, at any time."""
    ids, mask = pad_rows([torch.tensor(c.ids, dtype=torch.long) for c in canvases], value=vocabulary.eos_id)
    hints, _ = pad_rows([torch.tensor(c.hints, dtype=torch.long) for c in canvases], value=vocabulary.mask_id)
    windows, _ = pad_rows([torch.tensor(c.windows, dtype=torch.float32).view(-1, 2) for c in canvases])
    return CanvasBatch(ids, mask, torch.where(mask[..., None], windows, torch.tensor(ANYWHERE)), hints)


def slot_windows(start: float, end: float, slots: int) -> list[tuple[float, float]]:
    """When the slots of a word may be spoken.

    Some slots may be deleted, so slot k lies between its even share of the time and 1.6 times that, within the word.
    """
    share = (end - start) / max(1, slots)
    return [(start + k * share, start + min(slots, 1.6 * (k + 1)) * share) for k in range(slots)]


def num_open_slots(draft_tokens: int, extra_slots_ratio: float, extra_slots_per_word: int = 1) -> int:
    """Slots of a word that is left to the language model: its draft tokens, and extra ones."""
    return draft_tokens + extra_slots_per_word + math.floor(extra_slots_ratio * draft_tokens)


def build_canvas(
    words: Sequence[DraftWord],
    vocabulary: Vocabulary,
    threshold: float,
    extra_slots_ratio: float,
    extra_slots_at_end: int,
    extra_slots_per_word: int = 1,
) -> Canvas:
    """Lays a draft out in slots.

    Args:
        words: the draft.
        vocabulary: gives the tokens of a word.
        threshold: words of less confidence become open slots; above 1, all of them.
        extra_slots_ratio: extra slots of such a word, as a share of its draft tokens.
        extra_slots_at_end: open slots after the last word.
        extra_slots_per_word: extra slots of such a word, on top of the share.
    """
    canvas, mask = Canvas(), vocabulary.mask_id
    for word in words:
        tokens = vocabulary.word(word.text)
        if word.confidence < threshold:
            slots = num_open_slots(len(tokens), extra_slots_ratio, extra_slots_per_word)
            canvas.extend([mask] * slots, [*tokens, *[mask] * (slots - len(tokens))], 0.0, word.start, word.end)
        else:
            canvas.extend(tokens, [mask] * len(tokens), word.confidence, word.start, word.end)
    end = words[-1].end if words else 0.0
    canvas.extend([mask] * extra_slots_at_end, [mask] * extra_slots_at_end, 0.0, end, end, open_end=True)
    return canvas
