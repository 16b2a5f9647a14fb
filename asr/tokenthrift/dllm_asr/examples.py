"""Training responses: what the denoiser is shown and what it has to write.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992): text followed by EOS padding, slots hidden at a random
rate. What differs: a share of the rows looks like a draft after the CTC head, the train/test gap that the paper leaves
open. Spans of words are hidden as a whole, their slots are as many as a wrong draft would have made, and slots too many
are to be filled with DELETE.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenthrift.dllm_asr.corruption import Corrupted, corrupt, mask_rates, substitute
from tokenthrift.dllm_asr.draft import span_windows
from tokenthrift.dllm_asr.vocabulary import Vocabulary

__all__ = ["drafted", "padded", "responses"]

Times = Sequence[tuple[float, float]]  # when each word is spoken, in seconds
ANYWHERE = (0.0, math.inf)


def padded(words: Sequence[str], vocabulary: Vocabulary, rng: random.Random, seconds: float) -> list[int]:
    """A text and EOS up to a canvas a little too long, or as long as its duration suggests."""
    ids = [t for w in words for t in vocabulary.word(w)]
    spare = rng.randint(1, 8) if rng.random() < 0.7 else max(1, round(5.0 * seconds) + 2 - len(ids))
    return ids + [vocabulary.eos_id] * spare


@dataclass(slots=True)
class Row:
    """What to write, which slots are hidden, and where each is spoken."""

    ids: list[int] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)

    def extend(self, ids: list[int], hidden: bool, start: float, end: float) -> None:
        """Appends the slots of one word or span."""
        self.ids += ids
        self.hidden += [hidden] * len(ids)
        self.windows += [ANYWHERE] * len(ids) if math.isinf(end) else span_windows(start, end, len(ids))


def drafted(
    words: Sequence[str], times: Times | None, vocabulary: Vocabulary, rng: random.Random, slack: float = 0.3
) -> Row:
    """A text as a draft leaves it: unsure words hidden in spans of about their length, with a few EOS at the end."""
    unsure = rng.betavariate(1.0, 2.0)
    row = Row()
    span: list[int] = []
    edges = [0.0, 0.0]

    def close() -> None:
        if span:
            drafted_tokens = max(1, len(span) + rng.choice((-1, 0, 0, 0, 1, 1, 2)))
            slots = max(len(span), drafted_tokens + 1 + int(slack * drafted_tokens))
            row.extend([*span, *[vocabulary.delete_id] * (slots - len(span))], True, edges[0], edges[1])
            span.clear()

    for i, word in enumerate(words):
        start, end = times[i] if times else ANYWHERE
        start, end = start + rng.uniform(-0.06, 0.06), end + rng.uniform(-0.06, 0.06)
        if rng.random() < unsure:
            edges = [edges[0] if span else start, end]
            span.extend(vocabulary.word(word))
        else:
            close()
            row.extend(list(vocabulary.word(word)), False, start, end)
    close()
    last = times[-1][1] if times else 0.0
    for _ in range(rng.randint(1, 4)):
        row.ids.append(vocabulary.eos_id)
        row.hidden.append(True)
        row.windows.append((last, math.inf))
    return row


def responses(
    texts: Sequence[str],
    seconds: Sequence[float],
    times: Sequence[Times | None],
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    draft_share: float = 0.5,
    substitution: float = 0.03,
    positions: int = 248,
) -> tuple[Tensor, Tensor, Corrupted, Tensor]:
    """A batch of training responses.

    Args:
        texts: lower-case words.
        seconds: duration of each recording.
        times: when each word is spoken; None where that is not known.
        vocabulary: words to tokens.
        rng: source of randomness.
        draft_share: share of rows made by `drafted`; the others follow the published forward process.
        substitution: share of visible tokens replaced by random ones, so that visible tokens are doubted.
        positions: longest response.

    Returns:
        Targets `(B, L)`, the mask of their slots `(B, L)`, what the model sees, and the windows `(B, L, 2)` in seconds.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    rates = mask_rates(len(texts), fully_masked=0.3, generator=generator)
    rows: list[list[int]] = []
    spans: list[Row | None] = []
    for text, length, spoken in zip(texts, seconds, times, strict=True):
        words = text.split()
        spans.append(drafted(words, spoken, vocabulary, rng) if rng.random() < draft_share else None)
        row = spans[-1]
        rows.append((row.ids if row else padded(words, vocabulary, rng, length))[:positions])
    width = max(map(len, rows))
    targets = torch.tensor([r + [vocabulary.eos_id] * (width - len(r)) for r in rows])
    mask = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
    usual = torch.ones(vocabulary.size)
    usual[[vocabulary.mask_id, vocabulary.eos_id, vocabulary.start_id, vocabulary.delete_id]] = 0.0
    seen = corrupt(targets, mask, rates, mask_id=vocabulary.mask_id, generator=generator)
    # A row drawn as a draft hides its spans and nothing else; its visible tokens may be substituted like any others.
    masked = seen.masked.clone()
    windows = torch.tensor(ANYWHERE).repeat(len(rows), width, 1)
    for i, row in enumerate(spans):
        if row is not None:
            n = len(rows[i])
            masked[i] = torch.tensor(row.hidden[:n] + [False] * (width - n))
            windows[i, :n] = torch.tensor(row.windows[:n])
            rates[i] = masked[i].sum().clamp(min=1) / mask[i].sum()
    visible = mask & ~masked
    ids = substitute(targets, visible, substitution, usual, generator=generator).masked_fill(masked, vocabulary.mask_id)
    return targets, mask, Corrupted(ids, masked, visible & (ids != targets), rates), windows
