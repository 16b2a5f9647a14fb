"""The draft: a CTC head over characters on the frozen encoder gives words, their confidences and their times.

Source: dLLM-ASR (arXiv 2601.17902, section III-F); the size of its head is not published. Ours reads the states at
50 Hz and decodes greedily. The confidence of a word is that of its least confident character (Mask-CTC, arXiv
2005.08700, masks tokens by the same posterior). `canvas` lays the words out for the denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.dllm_asr.config import DraftConfig
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.padding import length_mask
from tokenthrift.whisper import STATE_SAMPLES, EncoderLayer

__all__ = [
    "CHARACTERS",
    "DraftHead",
    "DraftWord",
    "character_ids",
    "ctc_loss",
    "ctc_log_likelihood",
    "draft_entropy",
    "draft_words",
    "length_guard",
]

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"  # id 0 is the CTC blank, character i has id i + 1
SECONDS = STATE_SAMPLES / 16_000


class DraftHead(nn.Module):
    """Encoder states to character log-probabilities, 50 a second.

    Its layers run at 25 Hz, which is half the work, and each of their positions speaks for two frames: at 25 frames a
    second fast speech would have more characters than frames.

    Args:
        config: sizes.
        hidden_size: width of the encoder.
    """

    def __init__(self, config: DraftConfig, hidden_size: int) -> None:
        super().__init__()
        width, heads, ffn = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.conv = nn.Conv1d(hidden_size, width, 6, stride=2, padding=2)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 2 * (len(CHARACTERS) + 1))

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
    """CTC loss per target character, averaged over the recordings; one that is too short for its text counts as 0."""
    sizes = torch.tensor([len(t) for t in targets])
    flat = torch.tensor([i for t in targets for i in t], dtype=torch.long)
    losses = F.ctc_loss(
        log_p.transpose(0, 1), flat.to(log_p.device), lengths, sizes, reduction="none", zero_infinity=True
    )
    return (losses / sizes.to(losses.device).clamp(min=1)).mean()


@dataclass(frozen=True, slots=True)
class DraftWord:
    """A word of the draft: the posterior of its least confident character, and its time in seconds."""

    text: str
    confidence: float
    start: float
    end: float


def draft_words(log_p: Tensor, path: Tensor | None = None) -> list[DraftWord]:
    """CTC of one recording: `(N, 29)` log-probabilities to words, along the `(N,)` most probable path or a given one.

    The confidence of a run of frames of one character is the highest of its frames; that of a word is the lowest of its
    characters.
    """
    best, ids = log_p.max(-1) if path is None else (log_p.gather(1, path[:, None]).squeeze(1), path)
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


def ctc_log_likelihood(log_p: Tensor, text: str) -> float:
    """Log-probability that the CTC head gives a text: `(N, 29)` log-probabilities and lower-case words.

    It is -inf for a text with other characters, for an empty one, and for one with more characters than frames.
    """
    if not text or set(text) - set(CHARACTERS):
        return -math.inf
    ids = torch.tensor([character_ids(text)])
    sizes = torch.tensor([len(log_p)]), torch.tensor([ids.shape[1]])
    return -float(F.ctc_loss(log_p[:, None].float().cpu(), ids, *sizes, reduction="sum"))


def draft_entropy(log_p: Tensor) -> float:
    """The highest entropy of a frame, in nats, of the `(N, 29)` log-probabilities of one recording.

    A gate (self-speculative decoding, arXiv 2603.11243): where no frame is unsure, the language model need not run.
    """
    wide = log_p.double()
    return float((-(wide.exp() * wide).nan_to_num(0.0).sum(-1)).amax()) if len(log_p) else 0.0


def length_guard(words: Sequence[DraftWord], vocabulary: Vocabulary) -> int:
    """Most tokens that a causal decoder may write of a recording: twice those of the draft and eight; none without one.

    A decoder that loops (Whisper's does on strange sounds) is stopped there; what is said is never so much longer. It
    writes words of noise, too, in which the CTC head finds none.

    Args:
        words: the draft of the model's own CTC head, whatever other drafts there are: the guard, and with it the text,
            then depends on the recording alone.
        vocabulary: cuts words.
    """
    return 0 if not words else 8 + 2 * sum(len(vocabulary.word(word.text)) for word in words)
