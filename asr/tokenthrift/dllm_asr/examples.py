"""Training responses: what the denoiser is shown and what it has to write.

Source: dLLM-ASR (arXiv 2601.17902) and LLaDA (arXiv 2502.09992): text followed by EOS padding, slots hidden at a random rate. What differs: a
share of the rows looks like a draft after the CTC head, the train/test gap that the paper leaves open. Spans of words are hidden as a whole, their
slots are as many as a wrong draft would have made, and slots too many are to be filled with DELETE.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.dllm_asr.corruption import Corrupted, corrupt, mask_rates, substitute
from tokenthrift.dllm_asr.vocabulary import Vocabulary

__all__ = ["drafted", "padded", "responses"]

Row = tuple[list[int], list[bool]]  # what to write, and which slots are hidden


def padded(words: Sequence[str], vocabulary: Vocabulary, rng: random.Random, seconds: float) -> list[int]:
    """A text and EOS up to a canvas a little too long, or as long as its duration suggests."""
    ids = [t for w in words for t in vocabulary.word(w)]
    spare = rng.randint(1, 8) if rng.random() < 0.7 else max(1, round(5.0 * seconds) + 2 - len(ids))
    return ids + [vocabulary.eos_id] * spare


def drafted(words: Sequence[str], vocabulary: Vocabulary, rng: random.Random, slack: float = 0.3) -> Row:
    """A text as a draft leaves it: unsure words hidden in spans of about their length, with a few EOS at the end."""
    unsure = rng.betavariate(1.0, 2.0)
    ids: list[int] = []
    hidden: list[bool] = []
    span: list[int] = []

    def close() -> None:
        if span:
            drafted_tokens = max(1, len(span) + rng.choice((-1, 0, 0, 0, 1, 1, 2)))
            slots = max(len(span), drafted_tokens + 1 + int(slack * drafted_tokens))
            ids.extend([*span, *[vocabulary.delete_id] * (slots - len(span))])
            hidden.extend([True] * slots)
            span.clear()

    for word in words:
        tokens = vocabulary.word(word)
        if rng.random() < unsure:
            span.extend(tokens)
        else:
            close()
            ids.extend(tokens)
            hidden.extend([False] * len(tokens))
    close()
    margin = rng.randint(1, 4)
    return ids + [vocabulary.eos_id] * margin, hidden + [True] * margin


def responses(
    texts: Sequence[str],
    seconds: Sequence[float],
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    draft_share: float = 0.5,
    substitution: float = 0.03,
    positions: int = 248,
) -> tuple[Tensor, Tensor, Corrupted]:
    """A batch of training responses.

    Args:
        texts: lower-case words.
        seconds: duration of each recording.
        vocabulary: words to tokens.
        rng: source of randomness.
        draft_share: share of rows made by `drafted`; the others follow the published forward process.
        substitution: share of visible tokens replaced by random ones, so that visible tokens are doubted.
        positions: longest response.

    Returns:
        Targets `(B, L)`, the mask of their slots `(B, L)`, and what the model sees.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    rates = mask_rates(len(texts), fully_masked=0.3, generator=generator)
    rows: list[list[int]] = []
    spans: list[list[bool] | None] = []
    for text, length in zip(texts, seconds, strict=True):
        words = text.split()
        if rng.random() < draft_share:
            ids, hidden = drafted(words, vocabulary, rng)
            rows.append(ids[:positions])
            spans.append(hidden[:positions])
        else:
            rows.append(padded(words, vocabulary, rng, length)[:positions])
            spans.append(None)
    width = max(map(len, rows))
    targets = torch.tensor([r + [vocabulary.eos_id] * (width - len(r)) for r in rows])
    mask = torch.arange(width) < torch.tensor([len(r) for r in rows])[:, None]
    usual = torch.ones(vocabulary.size)
    usual[[vocabulary.mask_id, vocabulary.eos_id, vocabulary.start_id, vocabulary.delete_id]] = 0.0
    seen = corrupt(targets, mask, rates, mask_id=vocabulary.mask_id, generator=generator)
    # A row drawn as a draft hides its spans and nothing else; its visible tokens may be substituted like any others.
    masked = seen.masked.clone()
    for i, row in enumerate(spans):
        if row is not None:
            masked[i] = torch.tensor(row + [False] * (width - len(row)))
            rates[i] = masked[i].sum() / mask[i].sum()
    visible = mask & ~masked
    ids = substitute(targets, visible, substitution, usual, generator=generator).masked_fill(masked, vocabulary.mask_id)
    return targets, mask, Corrupted(ids, masked, visible & (ids != targets), rates)
