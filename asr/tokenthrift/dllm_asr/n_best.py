"""Several texts for one recording: sampled drafts, and of what is made of them the one of minimum Bayes risk.

Source: NAR-MBR decoding (Mask-CTC with sampled drafts; Interspeech 2026): paths are drawn from the CTC posteriors, and
the text with the lowest expected word errors against all of them is taken. Differs in that the risk is over the texts
after denoising, of which there are few, and that the first draft is always the greedy one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.dllm_asr.draft import DraftWord, draft_words
from tokenthrift.dllm_asr.edit_distance import edit_distance

__all__ = ["by_risk", "sampled_drafts"]


def sampled_drafts(log_p: Tensor, count: int, temperature: float = 1.0) -> list[list[DraftWord]]:
    """The greedy draft of one recording and `count - 1` drawn ones, the same for the same posteriors.

    Args:
        log_p: `(N, 29)` log-probabilities.
        count: at least 1.
        temperature: of the drawing; below 1 they are more alike.
    """
    generator = torch.Generator().manual_seed(0)
    drafts = [draft_words(log_p)]
    if count > 1 and len(log_p):
        p = (log_p.double() / temperature).softmax(-1)
        paths = torch.multinomial(p, count - 1, replacement=True, generator=generator)
        drafts += [draft_words(log_p, path) for path in paths.T]
    return drafts


def by_risk(texts: Sequence[str]) -> list[int]:
    """Positions of distinct texts, the lowest expected word errors first, the earlier among equals.

    Args:
        texts: drawn texts; a text that was drawn more often weighs more.
    """
    distinct = list(dict.fromkeys(texts))
    weights = [texts.count(text) for text in distinct]

    words = {text: text.split() for text in distinct}

    def risk(text: str) -> float:
        return sum(n * edit_distance(words[text], words[other]) for other, n in zip(distinct, weights, strict=True))

    return sorted((texts.index(text) for text in distinct), key=lambda position: (risk(texts[position]), position))
