"""Levenshtein distance, a token at a time: what aligns a text that grows with a draft, and counts word errors.

Differs from jiwer and rapidfuzz, which are not needed to transcribe, in that the distances to every beginning are kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["edit_distance", "next_distances"]


def next_distances(
    distances: NDArray[np.int64], draft: NDArray[np.int64], token: int, fixed: int | None = None
) -> NDArray[np.int64]:
    """Distances of a text to each beginning of a draft, after one more token of the text.

    Args:
        distances: before it, of `len(draft) + 1`; those of an empty text are 0, 1, 2 and so on.
        draft: the other text.
        token: of the text.
        fixed: a token for which no other one is substituted: it is left out or put in.
    """
    costs = np.where(draft == token, 0, 2 if token == fixed else 1)
    if fixed is not None and token != fixed:
        costs[draft == fixed] = 2
    kept_or_left_out = np.minimum(distances[:-1] + costs, distances[1:] + 1)
    # A token of the draft more costs one more, so less their positions the distances are a running minimum.
    positions = np.arange(len(distances))
    return np.minimum.accumulate(np.append(distances[0] + 1, kept_or_left_out) - positions) + positions


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Substitutions, deletions and insertions that make one text the other."""
    codes: dict[Hashable, int] = {}
    text, draft = ([codes.setdefault(token, len(codes)) for token in tokens] for tokens in (one, other))
    distances, numbers = np.arange(len(draft) + 1), np.array(draft, dtype=np.int64)
    for token in text:
        distances = next_distances(distances, numbers, token)
    return int(distances[-1])
