"""Training responses: what the denoiser is shown and what it has to write.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992): text followed by EOS padding, slots masked at a random
rate. What differs: part of the rows start from what the CTC head really wrote, the gap between training and decoding
that the paper leaves open. Words of low confidence are masked in the slots that they get in decoding, slots too many
are to be filled with DELETE, and wrong words of high confidence are to be doubted; part of these rows are shown as they
look some rounds later.

A row is made of the random numbers of its own utterance in its own epoch, so it does not depend on the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokenthrift import extras
from tokenthrift.dllm_asr.canvas import Canvas, num_open_slots, stack_canvases
from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.training.config import ExampleConfig
from tokenthrift.dllm_asr.training.corruption import Corrupted, corrupt, mask_rate, substitute
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.padding import pad_rows

__all__ = ["ResponseBatch", "Row", "align_words", "build_batch", "from_draft", "partially_decoded", "with_eos_padding"]

SLOTS_PER_SECOND = 5.0


@dataclass(slots=True)
class Row:
    """One response.

    Attributes:
        shown: what the model sees.
        targets: what it has to write.
        rate: probability with which a slot was masked.
    """

    shown: Canvas = field(default_factory=Canvas)
    targets: list[int] = field(default_factory=list)
    rate: float = 1.0


def with_eos_padding(words: Sequence[str], vocabulary: Vocabulary, rng: random.Random, seconds: float) -> list[int]:
    """A text and EOS, up to a response a little too long or as long as its duration suggests."""
    ids = [t for w in words for t in vocabulary.word(w)]
    guess = max(1, round(SLOTS_PER_SECOND * seconds) + 2 - len(ids))
    extra = rng.randint(1, 8) if rng.random() < 0.7 else guess
    return ids + [vocabulary.eos_id] * extra


def align_words(draft: Sequence[str], words: Sequence[str]) -> list[int]:
    """Which true words each draft word stands for: draft word k stands for words[r[k] : r[k + 1]].

    Boundaries of draft words are carried over to the true text along the character alignment of both, and from there
    to the nearest start of a true word.

    Args:
        draft: the words of the draft.
        words: the words spoken.

    Returns:
        `len(draft) + 1` ascending indices, the first 0 and the last `len(words)`.
    """
    levenshtein = extras.require("rapidfuzz.distance").Levenshtein
    starts = [0]
    for word in words:
        starts.append(starts[-1] + len(word) + 1)
    moves = list(levenshtein.opcodes(" ".join(draft), " ".join(words)))
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


def from_draft(
    words: Sequence[str],
    draft: Sequence[DraftWord],
    vocabulary: Vocabulary,
    rng: random.Random,
    extra_slots_ratio: float = 0.3,
) -> Row:
    """A text as its draft leaves it.

    It is laid out as in decoding, under a random threshold. Wrong words of high confidence stay visible, or are opened
    where the truth needs more slots than they have.
    """
    bounds = align_words([w.text for w in draft], words)
    threshold = 2.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.0)
    opened = rng.betavariate(1.0, 6.0)
    draft = [w if rng.random() > opened else replace(w, confidence=0.0) for w in draft]
    row, mask, delete = Row(), vocabulary.mask_id, vocabulary.delete_id
    for word, first, last in zip(draft, bounds, bounds[1:], strict=False):
        tokens = vocabulary.word(word.text)
        truth = tuple(t for w in words[first:last] for t in vocabulary.word(w))
        is_wrong = truth != tokens
        if word.confidence < threshold or len(truth) > len(tokens) or (is_wrong and rng.random() < 0.3):
            slots = max(len(truth), num_open_slots(len(tokens), extra_slots_ratio))
            row.shown.extend([mask] * slots, [*tokens, *[mask] * (slots - len(tokens))], 0.0, word.start, word.end)
        else:
            slots = len(tokens)
            row.shown.extend(tokens, [mask] * slots, 1.0, word.start, word.end)
        row.targets += [*truth, *[delete] * (slots - len(truth))]
    extra, end = rng.randint(1, 4), draft[-1].end
    row.shown.extend([mask] * extra, [mask] * extra, 0.0, end, end, open_end=True)
    row.targets += [vocabulary.eos_id] * extra
    return row


def partially_decoded(row: Row, vocabulary: Vocabulary, rng: random.Random) -> Row:
    """A response some rounds later.

    A random share of its open slots hold their target, deletions too. Half of the time the end is found, so that the
    extra slots after it are gone.
    """
    share, eos = rng.random(), vocabulary.eos_id
    end = row.targets.index(eos) if eos in row.targets and rng.random() < 0.5 else len(row.targets)
    later = Row(row.shown.first(max(1, end)), row.targets[: max(1, end)])
    for i, target in enumerate(later.targets):
        if later.shown.ids[i] == vocabulary.mask_id and target != eos and rng.random() < share:
            later.shown.ids[i] = target
    return later


@dataclass(frozen=True, slots=True)
class ResponseBatch:
    """A batch of training responses.

    Attributes:
        targets: `(B, L)`, what has to be written.
        mask: `(B, L)`, where a slot exists.
        corrupted: what the model sees of the targets.
        windows: `(B, L, 2)` in seconds.
        hints: `(B, L)`, tokens of the draft in open slots, MASK elsewhere.
    """

    targets: Tensor
    mask: Tensor
    corrupted: Corrupted
    windows: Tensor
    hints: Tensor

    def to(self, device: torch.device | str) -> ResponseBatch:
        """The batch on another device."""
        seen = Corrupted(
            *(part.to(device) for part in (self.corrupted.ids, self.corrupted.masked, self.corrupted.rates))
        )
        targets, mask, windows, hints = (p.to(device) for p in (self.targets, self.mask, self.windows, self.hints))
        return ResponseBatch(targets, mask, seen, windows, hints)


def build_batch(
    texts: Sequence[str],
    seconds: Sequence[float],
    drafts: Sequence[Sequence[DraftWord]],
    seeds: Sequence[int],
    vocabulary: Vocabulary,
    config: ExampleConfig,
    *,
    max_slots: int,
) -> ResponseBatch:
    """A batch of training responses; each row depends on its own text, draft and seed alone.

    Args:
        texts: lower-case words.
        seconds: duration of each recording.
        drafts: what the CTC head wrote of each; empty where there is none.
        seeds: of the random numbers of each.
        vocabulary: words to tokens.
        config: what is shown.
        max_slots: most slots of a response; longer ones are cut.
    """
    rows = [
        _row(text.split(), length, draft, vocabulary, random.Random(seed), config, max_slots)
        for text, length, draft, seed in zip(texts, seconds, drafts, seeds, strict=True)
    ]
    targets, _ = pad_rows([torch.tensor(row.targets) for row in rows], value=vocabulary.eos_id)
    seen = stack_canvases([row.shown for row in rows], vocabulary)
    rates = torch.tensor([row.rate for row in rows])
    corrupted = Corrupted(seen.ids, seen.ids == vocabulary.mask_id, rates)
    return ResponseBatch(targets, seen.mask, corrupted, seen.windows, seen.hints)


def _row(
    words: Sequence[str],
    seconds: float,
    draft: Sequence[DraftWord],
    vocabulary: Vocabulary,
    rng: random.Random,
    config: ExampleConfig,
    max_slots: int,
) -> Row:
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    if draft and rng.random() < config.from_draft_prob:
        row = from_draft(words, draft, vocabulary, rng)
        if rng.random() < config.partially_decoded_prob:
            row = partially_decoded(row, vocabulary, rng)
        row = Row(row.shown.first(max_slots), row.targets[:max_slots])
        ids = torch.tensor(row.shown.ids)
        row.rate = int((ids == vocabulary.mask_id).sum().clamp(min=1)) / len(ids)
    else:
        targets = with_eos_padding(words, vocabulary, rng, seconds)[:max_slots]
        rate = mask_rate(rng.random(), fully_masked_prob=config.fully_masked_prob)
        ids = corrupt(torch.tensor(targets), rate, mask_id=vocabulary.mask_id, generator=generator)
        row, masks = Row(Canvas(), targets, rate), [vocabulary.mask_id] * len(targets)
        row.shown.extend(masks, masks, 0.0, 0.0, seconds, open_end=True)
    usual = torch.ones(vocabulary.size)
    usual[[vocabulary.mask_id, vocabulary.eos_id, vocabulary.start_id, vocabulary.delete_id]] = 0.0
    visible = ids != vocabulary.mask_id
    row.shown.ids = substitute(ids, visible, config.substitute_prob, usual, generator=generator).tolist()
    return row
