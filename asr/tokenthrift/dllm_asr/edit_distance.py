"""Levenshtein distance, a token at a time: what aligns a text that grows with a draft, and counts word errors.

Differs from jiwer and rapidfuzz, which are not needed to transcribe, in that the distances to every beginning are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["edit_distance", "next_distances"]

T = TypeVar("T")


def next_distances(distances: Sequence[int], draft: Sequence[T], token: T, fixed: T | None = None) -> list[int]:
    """Distances of a text to each beginning of a draft, after one more token of the text.

    Args:
        distances: before it, of `len(draft) + 1`; those of an empty text are 0, 1, 2 and so on.
        draft: the other text.
        token: of the text.
        fixed: a token for which no other one is substituted: it is left out or put in.
    """
    row = [distances[0] + 1]
    for position, own in enumerate(draft):
        costs = 0 if own == token else 2 if fixed in (own, token) else 1
        row.append(min(distances[position] + costs, distances[position + 1] + 1, row[position] + 1))
    return row


def edit_distance(one: Sequence[T], other: Sequence[T]) -> int:
    """Substitutions, deletions and insertions that make one text the other."""
    distances = list(range(len(other) + 1))
    for token in one:
        distances = next_distances(distances, other, token)
    return distances[-1]
