"""Training responses: what the denoiser is shown and what it has to write.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992): text followed by EOS padding, slots hidden at a random
rate. What differs: a share of the rows starts from what the CTC head really wrote, the train/test gap that the paper
leaves open. Its unsure words are hidden in the slots they get in decoding, slots too many are to be filled with DELETE,
and sure words that are wrong are to be doubted; part of these rows are shown as they look some rounds later.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokenthrift.dllm_asr.draft import Canvas, DraftWord, open_slots
from tokenthrift.dllm_asr.training.corruption import Corrupted, corrupt, mask_rates, substitute
from tokenthrift.dllm_asr.vocabulary import Vocabulary

__all__ = ["Responses", "decided", "drafted", "padded", "responses", "spoken_by"]

ANYWHERE = (0.0, math.inf)


def padded(words: Sequence[str], vocabulary: Vocabulary, rng: random.Random, seconds: float) -> list[int]:
    """A text and EOS up to a canvas a little too long, or as long as its duration suggests."""
    ids = [t for w in words for t in vocabulary.word(w)]
    spare = rng.randint(1, 8) if rng.random() < 0.7 else max(1, round(5.0 * seconds) + 2 - len(ids))
    return ids + [vocabulary.eos_id] * spare


@dataclass(slots=True)
class Row:
    """A draft's response: what the model sees, what it has to write, where it may be spoken, what the draft had."""

    seen: Canvas = field(default_factory=Canvas)
    ids: list[int] = field(default_factory=list)


def spoken_by(draft: Sequence[str], words: Sequence[str]) -> list[int]:
    """Which true words each draft word stands for: draft word k stands for words[r[k] : r[k + 1]].

    Boundaries of draft words are carried over to the true text along the character alignment of both, and from there
    to the nearest start of a true word.

    Args:
        draft: the words of the draft.
        words: the words spoken.

    Returns:
        `len(draft) + 1` ascending indices, the first 0 and the last `len(words)`.
    """
    from rapidfuzz.distance import Levenshtein

    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    moves = list(Levenshtein.opcodes(" ".join(draft), " ".join(words)))
    bounds, position, at = [0], 0, 0
    for word in draft[:-1]:
        position += len(word) + 1
        while moves[at].src_end < position or moves[at].src_start == moves[at].src_end:
            at += 1
        move = moves[at]
        share = (position - move.src_start) / (move.src_end - move.src_start)
        there = move.dest_start + share * (move.dest_end - move.dest_start)
        nearest = min(range(len(starts)), key=lambda i: abs(starts[i] - there))
        bounds.append(min(max(nearest, bounds[-1]), len(words)))
    return [*bounds, len(words)]


def drafted(
    words: Sequence[str], draft: Sequence[DraftWord], vocabulary: Vocabulary, rng: random.Random, slack: float = 0.3
) -> Row:
    """A text as its draft leaves it.

    Laid out as in decoding, under a random threshold; sure words that are wrong stay visible, or are opened where the
    truth needs more slots than they have.
    """
    bounds = spoken_by([w.text for w in draft], words)
    threshold = 2.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.0)
    doubted = rng.betavariate(1.0, 6.0)
    draft = [w if rng.random() > doubted else replace(w, confidence=0.0) for w in draft]
    row, mask, delete = Row(), vocabulary.mask_id, vocabulary.delete_id
    for word, first, last in zip(draft, bounds, bounds[1:], strict=False):
        had = vocabulary.word(word.text)
        true = tuple(t for w in words[first:last] for t in vocabulary.word(w))
        if word.confidence < threshold or len(true) > len(had) or (true != had and rng.random() < 0.3):
            slots = max(len(true), open_slots(len(had), slack))
            hints = [*had, *[mask] * (slots - len(had))]
            row.seen.extend([mask] * slots, hints, 0.0, word.start, word.end)
        else:
            slots = len(had)
            row.seen.extend(had, [mask] * slots, 1.0, word.start, word.end)
        row.ids += [*true, *[delete] * (slots - len(true))]
    margin, end = rng.randint(1, 4), draft[-1].end
    row.seen.extend([mask] * margin, [mask] * margin, 0.0, end, end, tail=True)
    row.ids += [vocabulary.eos_id] * margin
    return row


def decided(row: Row, vocabulary: Vocabulary, rng: random.Random) -> Row:
    """A response some rounds later: a random share of its open slots hold what they should, deletions too, and half of
    the time its end is found, so that the spare slots are gone."""
    share = rng.random()
    end = row.ids.index(vocabulary.eos_id) if vocabulary.eos_id in row.ids and rng.random() < 0.5 else len(row.ids)
    later = Row(row.seen.clipped(max(1, end)), row.ids[: max(1, end)])
    for i, true in enumerate(later.ids):
        if later.seen.ids[i] == vocabulary.mask_id and true != vocabulary.eos_id and rng.random() < share:
            later.seen.ids[i] = true
    return later


@dataclass(frozen=True, slots=True)
class Responses:
    """A batch of training responses: targets `(B, L)`, the mask of their slots, what the model sees of them, windows
    `(B, L, 2)` in seconds and hints `(B, L)`."""

    targets: Tensor
    mask: Tensor
    seen: Corrupted
    windows: Tensor
    hints: Tensor


def responses(
    texts: Sequence[str],
    seconds: Sequence[float],
    drafts: Sequence[Sequence[DraftWord]],
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    positions: int,
    draft_share: float = 0.5,
    decided_share: float = 0.0,
    fully_masked: float = 0.2,
    substitution: float = 0.03,
) -> Responses:
    """A batch of training responses.

    Args:
        texts: lower-case words.
        seconds: duration of each recording.
        drafts: what the CTC head wrote of each; empty where there is none.
        vocabulary: words to tokens.
        rng: source of randomness.
        draft_share: share of rows made by `drafted`, of those that have a draft; the others follow the published
            forward process.
        decided_share: share of the rows made by `drafted` that are shown some rounds later, see `decided`.
        fully_masked: share of the rows of the forward process that are masked from end to end.
        substitution: share of visible tokens replaced by random ones, so that visible tokens are doubted.
        positions: longest response.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    rates = mask_rates(len(texts), fully_masked=fully_masked, generator=generator)
    rows: list[Row | None] = []
    ids: list[list[int]] = []
    for text, length, draft in zip(texts, seconds, drafts, strict=True):
        row = drafted(text.split(), draft, vocabulary, rng) if draft and rng.random() < draft_share else None
        if row and rng.random() < decided_share:
            row = decided(row, vocabulary, rng)
        rows.append(row)
        ids.append((row.ids if row else padded(text.split(), vocabulary, rng, length))[:positions])
    width = max(map(len, ids))
    targets = torch.tensor([r + [vocabulary.eos_id] * (width - len(r)) for r in ids])
    mask = torch.arange(width) < torch.tensor([len(r) for r in ids])[:, None]
    usual = torch.ones(vocabulary.size)
    usual[[vocabulary.mask_id, vocabulary.eos_id, vocabulary.start_id, vocabulary.delete_id]] = 0.0
    masked = corrupt(targets, mask, rates, mask_id=vocabulary.mask_id, generator=generator).masked
    shown, hints = targets.clone(), torch.full_like(targets, vocabulary.mask_id)
    windows = torch.tensor(ANYWHERE).repeat(len(ids), width, 1)
    for i, row in enumerate(rows):
        if row is not None:
            n, canvas = len(ids[i]), row.seen.clipped(len(ids[i]))
            shown[i, :n], hints[i, :n] = torch.tensor(canvas.ids), torch.tensor(canvas.hints)
            windows[i, :n] = torch.tensor(canvas.windows)
            masked[i] = shown[i] == vocabulary.mask_id
            rates[i] = masked[i].sum().clamp(min=1) / n
    shown = substitute(shown, mask & ~masked, substitution, usual, generator=generator)
    shown = shown.masked_fill(masked, vocabulary.mask_id)
    return Responses(targets, mask, Corrupted(shown, masked, rates), windows, hints)
