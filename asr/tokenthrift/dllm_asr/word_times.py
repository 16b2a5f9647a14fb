"""When each word of a text is spoken: forced alignment of its letters to the posteriors of the CTC head.

Source: CTC forced alignment as in Kürzinger et al. (arXiv 2007.09127); WhisperX (arXiv 2303.00747) does the same with a
second network. Here the head that drafted is on the same encoder, so times cost no network. Times never go back,
because the alignment does not. torchaudio's `forced_align` gives the same path; transcribing does not need torchaudio.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenthrift.dllm_asr.draft import CHARACTERS
from tokenthrift.transcript import Word
from tokenthrift.whisper import STATE_SAMPLES

__all__ = ["forced_align", "time_tokens", "time_words", "word_positions"]

SECONDS = STATE_SAMPLES / 16_000


def time_words(log_p: Tensor, words: Sequence[str], confidence: Sequence[float]) -> tuple[Word, ...]:
    """Words of a text with their times.

    Args:
        log_p: `(N, 29)` log-probabilities of one recording.
        words: as written; letters of either case and apostrophes are aligned, other characters take no time.
        confidence: of each.

    Returns:
        Their words; starts and ends never go back. A text with more letters than the recording has frames is spread
        evenly over it.
    """
    letters = [[CHARACTERS.index(c) + 1 for c in word.lower() if c in CHARACTERS[1:]] for word in words]
    spoken = [word for word in letters if word]
    spans = iter(_align(log_p, spoken))
    times: list[tuple[float, float]] = []
    for word in letters:
        last = times[-1][1] if times else 0.0
        times.append(next(spans) if word else (last, last))
    return tuple(Word(w, a, b, c) for w, (a, b), c in zip(words, times, confidence, strict=True))


def _align(log_p: Tensor, words: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Start and end in seconds of words that have letters."""
    if not words:
        return []
    targets = [token for word in words for token in (1, *word)][1:]
    needed = len(targets) + sum(a == b for a, b in pairwise(targets))
    if needed > len(log_p):
        share = len(log_p) * SECONDS / len(words)
        return [(i * share, (i + 1) * share) for i in range(len(words))]
    spans = forced_align(log_p.float().cpu().numpy(), targets)
    times, at = [], 0
    for word in words:
        times.append((spans[at][0] * SECONDS, spans[at + len(word) - 1][1] * SECONDS))
        at += len(word) + 1
    return times


def forced_align(log_p: NDArray[np.float32], targets: Sequence[int]) -> list[tuple[int, int]]:
    """First frame and the one after the last of each target, on the most probable path of CTC that writes them.

    Args:
        log_p: `(N, labels)`; label 0 is the blank.
        targets: labels; with a blank between equal neighbors, no more than there are frames.
    """
    labels = np.zeros(2 * len(targets) + 1, dtype=np.int64)
    labels[1::2] = targets
    emitted = log_p[:, labels]
    # A blank may be left out between labels that differ.
    skips = np.zeros(len(labels), dtype=bool)
    skips[3::2] = labels[3::2] != labels[1:-2:2]
    score = np.full(len(labels), -np.inf, dtype=log_p.dtype)
    score[:2] = emitted[0, :2]
    moves = np.zeros((len(log_p), len(labels)), dtype=np.int8)
    before = np.full((3, len(labels)), -np.inf, dtype=log_p.dtype)
    for frame in range(1, len(log_p)):
        before[0] = score
        before[1, 1:] = score[:-1]
        before[2, 2:] = np.where(skips[2:], score[:-2], -np.inf)
        moves[frame] = before.argmax(0)
        score = before.max(0) + emitted[frame]
    position = len(labels) - 1 - int(score[-2] > score[-1])
    spans = [(0, 0)] * len(targets)
    for frame in range(len(log_p) - 1, -1, -1):
        if position % 2:
            target = position // 2
            spans[target] = (frame, spans[target][1] or frame + 1)
        position -= int(moves[frame, position])
    return spans


def word_positions(pieces: Sequence[str]) -> list[int]:
    """To which word of the text each token belongs: the first that it writes, as `str.split` parts words; one that
    writes nothing, to the word before it."""
    out, word, apart = [], -1, True
    for piece in pieces:
        words = piece.split()
        if words:
            word += apart or piece[0].isspace()
        out.append(max(word, 0))
        word += max(0, len(words) - 1)
        apart = piece[-1].isspace() if piece else apart
    return out


def time_tokens(pieces: Sequence[str], words: Sequence[Word]) -> list[tuple[float, float]]:
    """Start and end of tokens in seconds: an even share of their word.

    Args:
        pieces: what each token writes, see `Vocabulary.pieces`.
        words: that they make.
    """
    if not words:
        return [(0.0, 0.0)] * len(pieces)
    owners = word_positions(pieces)
    out = []
    for position, owner in enumerate(owners):
        word, first, count = words[owner], owners.index(owner), owners.count(owner)
        step = (word.end - word.start) / count
        out.append((word.start + (position - first) * step, word.start + (position - first + 1) * step))
    return out
