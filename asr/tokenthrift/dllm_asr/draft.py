"""The draft: a CTC head over characters on the frozen encoder gives words, their confidences and their times.

Source: dLLM-ASR (arXiv 2601.17902, section III-F) places a CTC transcript in the response; neither the size of its head
nor the way the draft meets the mask is published. Ours reads the states at 50 Hz, decodes greedily, and calls a word as
sure as its least sure character (Mask-CTC, arXiv 2005.08700, masks tokens by the same posterior). Unsure words become
open slots with a few to spare: what the language model does not need it fills with DELETE, so a wrong length
of the draft is repaired too. What the draft had there stays as a hint, and every slot knows when it is spoken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.whisper import STATE_SAMPLES, EncoderLayer, length_mask

__all__ = [
    "CHARACTERS",
    "Canvas",
    "DraftHead",
    "DraftWord",
    "canvas_of",
    "character_ids",
    "ctc_loss",
    "draft_words",
    "likelihood",
    "open_slots",
    "span_windows",
]

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"  # id 0 is the CTC blank, character i has id i + 1
SECONDS = STATE_SAMPLES / 16_000


class DraftHead(nn.Module):
    """Encoder states to character log-probabilities, 50 a second.

    Its layers run at 25 Hz, which is half the work, and each of their positions speaks for two frames: at 25 frames a
    second fast speech would have more characters than frames.

    Args:
        config: sizes.
        width: width of the encoder.
    """

    def __init__(self, config: DraftConfig, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, config.width, 6, stride=2, padding=2)
        self.layers = nn.ModuleList(EncoderLayer(config.width, config.heads, config.ffn) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, 2 * (len(CHARACTERS) + 1))

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """States `(B, N, width)` to log-probabilities `(B, N, 29)`; what stands after a recording is not read."""
        frames = states.shape[1]
        states = states.masked_fill(~length_mask(lengths, frames)[..., None], 0.0)
        x = F.pad(states, (0, 0, 0, frames % 2)).transpose(1, 2)
        x = F.gelu(self.conv(x)).transpose(1, 2)
        valid = length_mask(torch.ceil(lengths / 2), x.shape[1])
        mask = None if bool(valid.all()) else valid[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        logits: Tensor = self.output(self.norm(x)).unflatten(2, (2, -1)).flatten(1, 2)[:, :frames]
        return logits.float().log_softmax(-1)


def character_ids(text: str) -> list[int]:
    """CTC targets of a text of lower-case words."""
    return [CHARACTERS.index(c) + 1 for c in text]


def ctc_loss(log_p: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """CTC loss per target character, averaged over the recordings that are long enough for their text."""
    sizes = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([i for t in targets for i in t], dtype=torch.long)
    losses = F.ctc_loss(
        log_p.transpose(0, 1), flat.to(log_p.device), lengths, sizes, reduction="none", zero_infinity=True
    )
    return (losses / sizes.to(losses.device).clamp(min=1)).mean()


@dataclass(frozen=True, slots=True)
class DraftWord:
    """A word of the draft: its posterior (of its least sure character) and its time in seconds."""

    text: str
    confidence: float
    start: float
    end: float


def draft_words(log_p: Tensor) -> list[DraftWord]:
    """Greedy CTC of one recording: `(N, 29)` log-probabilities to words.

    A run of frames of one character is as sure as its surest frame; a word as its least sure character.
    """
    best, ids = log_p.max(-1)
    words: list[DraftWord] = []
    letters: list[tuple[str, float, int, int]] = []

    def flush() -> None:
        if letters:
            text = "".join(c for c, *_ in letters)
            words.append(
                DraftWord(text, min(p for _, p, *_ in letters), letters[0][2] * SECONDS, (letters[-1][3] + 1) * SECONDS)
            )
            letters.clear()

    previous = 0
    for frame, (token, p) in enumerate(zip(ids.tolist(), best.exp().tolist(), strict=True)):
        if token and token == previous:
            if letters and token != 1:
                c, q, first, _ = letters[-1]
                letters[-1] = (c, max(p, q), first, frame)
        elif token == 1:
            flush()
        elif token:
            letters.append((CHARACTERS[token - 1], p, frame, frame))
        previous = token
    flush()
    return words


def likelihood(log_p: Tensor, text: str) -> float:
    """Log-probability that the CTC head gives a text: `(N, 29)` log-probabilities and lower-case words.

    What is written in other characters, and an empty text or one that has more characters than frames, is never likely.
    """
    if not text or set(text) - set(CHARACTERS):
        return -math.inf
    ids = torch.tensor([character_ids(text)])
    sizes = torch.tensor([len(log_p)]), torch.tensor([ids.shape[1]])
    return -float(F.ctc_loss(log_p[:, None].float().cpu(), ids, *sizes, reduction="sum"))


@dataclass(slots=True)
class Canvas:
    """The response a denoiser starts from, slot by slot.

    Attributes:
        ids: token, or MASK where the slot is open.
        confidence: posterior of the token, 0 where open.
        times: seconds of start and end; they never decrease.
        windows: where the words of the slot may be spoken, in seconds, see `span_windows`.
        hints: the unsure token that the draft had in an open slot, MASK where there is none.
    """

    ids: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)
    hints: list[int] = field(default_factory=list)

    def extend(
        self, ids: Sequence[int], hints: Sequence[int], confidence: float, start: float, end: float, tail: bool = False
    ) -> None:
        """Appends the slots of a word or span; those of a tail may be spoken any time from its start."""
        slots = len(ids)
        step = (end - start) / max(1, slots)
        self.ids += ids
        self.hints += hints
        self.confidence += [confidence] * slots
        self.times += [(start + i * step, start + (i + 1) * step) for i in range(slots)]
        self.windows += [(start, math.inf)] * slots if tail else span_windows(start, end, slots)

    def clipped(self, slots: int | None) -> Canvas:
        """The first `slots` slots; all of them where None."""
        return Canvas(
            self.ids[:slots], self.confidence[:slots], self.times[:slots], self.windows[:slots], self.hints[:slots]
        )


def span_windows(start: float, end: float, slots: int) -> list[tuple[float, float]]:
    """Where the slots of a span may be spoken: as some may be deleted, slot k lies between its even share of the time
    and 1.6 times that, as far as the span goes."""
    share = (end - start) / max(1, slots)
    return [(start + k * share, start + min(slots, 1.6 * (k + 1)) * share) for k in range(slots)]


def open_slots(draft_tokens: int, slack: float, spare: int = 1) -> int:
    """Slots of an unsure word whose draft had so many tokens: those, some to spare, and a share of them."""
    return draft_tokens + spare + math.floor(slack * draft_tokens)


def canvas_of(
    words: Sequence[DraftWord],
    vocabulary: Vocabulary,
    threshold: float,
    slack: float,
    margin: int,
    spare: int = 1,
) -> Canvas:
    """Lays a draft out in slots.

    Args:
        words: the draft.
        vocabulary: gives the tokens of a word.
        threshold: words less sure than this become open slots; above 1, all of them.
        slack: spare slots of an unsure word, as a share of its draft tokens, on top of `spare`.
        margin: open slots at the end.
        spare: spare slots of an unsure word.
    """
    canvas, mask = Canvas(), vocabulary.mask_id
    for word in words:
        tokens = vocabulary.word(word.text)
        if word.confidence < threshold:
            slots = open_slots(len(tokens), slack, spare)
            canvas.extend([mask] * slots, [*tokens, *[mask] * (slots - len(tokens))], 0.0, word.start, word.end)
        else:
            canvas.extend(tokens, [mask] * len(tokens), word.confidence, word.start, word.end)
    end = words[-1].end if words else 0.0
    canvas.extend([mask] * margin, [mask] * margin, 0.0, end, end, tail=True)
    return canvas
