"""Greedy decoding of a batch, one step at a time, for any decoder.

Each row stops on its own and leaves the batch, so a short text does not pay for a long neighbor. Every token comes with
its probability, and no random number is drawn.

Differs from `generate` of transformers: rows have limits of their own, finished rows are dropped instead of padded, and
the decoder is a function, so a decoder with cross-attention works as well as one that reads a prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Generation", "greedy", "without_end"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated for one row.

    Attributes:
        ids: tokens without the end.
        probabilities: of each token, and of the end where the text came to one.
    """

    ids: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities; 0 where one of them is 0 or there is none."""
        if not self.probabilities or min(self.probabilities) <= 0:
            return 0.0
        return math.exp(sum(map(math.log, self.probabilities)) / len(self.probabilities))


def greedy(
    logits: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    limits: Sequence[int],
    end: int,
    *,
    forbidden: Sequence[int] = (),
) -> list[Generation]:
    """Takes the most probable token of each row until it ends or reaches its limit.

    Args:
        logits: (B, V) scores of the first token of each row.
        step: takes the tokens (n,) of the rows that go on and their indices (n,) among the rows of the call before, and
            returns the scores (n, V) of their next tokens.
        limits: most tokens of each row, its end included; at least 1.
        end: token that ends a text.
        forbidden: tokens that are never chosen.
    """
    ids: list[list[int]] = [[] for _ in limits]
    probabilities: list[list[float]] = [[] for _ in limits]
    rows = list(range(len(limits)))
    while True:
        logits = logits.float()
        if forbidden:
            logits = logits.index_fill(1, torch.tensor(forbidden, device=logits.device), float("-inf"))
        best, tokens = logits.log_softmax(-1).max(-1)
        going = []
        for position, (row, token, chance) in enumerate(zip(rows, tokens.tolist(), best.exp().tolist(), strict=True)):
            ids[row].append(token)
            probabilities[row].append(chance)
            if token != end and len(ids[row]) < limits[row]:
                going.append(position)
        if not going:
            break
        rows = [rows[position] for position in going]
        indices = torch.tensor(going, device=tokens.device)
        logits = step(tokens[indices], indices)
    return [without_end(row, chances, end) for row, chances in zip(ids, probabilities, strict=True)]


def without_end(ids: Sequence[int], probabilities: Sequence[float], end: int) -> Generation:
    """A generation from tokens that may have the end as their last."""
    return Generation(tuple(ids[:-1] if ids and ids[-1] == end else ids), tuple(probabilities))
