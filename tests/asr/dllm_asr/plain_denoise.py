"""The loop dLLM-ASR decoded with before the samplers, as an oracle, and `PriorGuidedSampler` by the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers import Canvas, PriorGuidedSampler, Sampled, TokenIds, sample
from tokenthrift.budget import DecodeBudget

__all__ = ["Denoised", "Predict", "Prune", "commit", "denoise", "first_index", "sampled", "score"]

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids (R, W), mask (R, W), rows (R,)) -> logits (R, W, vocab); `rows` index the batch given to `denoise`."""

Prune = Literal["every", "first", "never"]
"""After which rounds a committed EOS cuts the canvas; "first" is the released behavior."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """The outcome of `denoise` for a batch.

    Attributes:
        ids: (B, L) int64; `eos_id` beyond a row's length.
        confidence: (B, L) float64, the model's probability of the token at the moment it was committed (of a draft
            token: in the first round); NaN where no forward pass saw the slot and beyond a row's length.
        lengths: (B,) int64, slots left after pruning.
        rounds: (B,) int64, forward passes in which the row took part.
        forwards: calls of `predict`.
        eos_id: id that ends the text.
        delete_id: id that leaves no text, if any.
    """

    ids: Tensor
    confidence: Tensor
    lengths: Tensor
    rounds: Tensor
    forwards: int
    eos_id: int
    delete_id: int | None = None

    def text_slots(self) -> list[list[int]]:
        """Per row, the slots that make its text: those before the first EOS that hold no deletion."""
        texts = []
        for ids, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True):
            end = ids.index(self.eos_id) if self.eos_id in ids[:length] else length
            texts.append([slot for slot in range(end) if ids[slot] != self.delete_id])
        return texts


def score(logits: Tensor, ids: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores slots in float64, because half of a well-trained model's confidences round to 1 in half precision.

    Args:
        logits: (S, vocab).
        ids: (S,) int64, the tokens now in those slots.
        mask_id: id that is never a candidate; the other probabilities are renormalized without it.

    Returns:
        (S,) most probable token (the lower id among equals), (S,) its probability, (S,) the probability of `ids`.
    """
    wide = logits.to(torch.float64, copy=True)
    wide[:, mask_id] = float("-inf")
    log_p = wide.log_softmax(-1)
    best, token = log_p.max(-1)
    own = log_p.gather(1, ids.unsqueeze(1)).squeeze(1)
    return token, best.exp(), own.exp()


def commit(confidence: Tensor, open_slots: Tensor, threshold: float) -> Tensor:
    """Chooses the slots to commit: every open one that reaches the threshold, and the most confident one of each row.

    Args:
        confidence: (B, L) float, probability of the candidate.
        open_slots: (B, L) bool, slots that hold no token yet.
        threshold: probability in (0, 1]; above 1 exactly one slot per round is committed.

    Returns:
        (B, L) bool, a subset of `open_slots`, with at least one slot in every row that has an open one; among equal
        confidences the leftmost counts as the highest.
    """
    highest = confidence.masked_fill(~open_slots, -1.0).argmax(1, keepdim=True)
    return open_slots & (confidence >= threshold).scatter(1, highest, True)


def first_index(where: Tensor) -> Tensor:
    """First True of each row of (B, L) bool as (B,) int64; L where there is none."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])


@torch.no_grad()
def denoise(
    predict: Predict,
    ids: Tensor,
    mask: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    budget: DecodeBudget,
    threshold: float = 0.9,
    prune: Prune = "every",
    verify_threshold: float | None = None,
    verify_committed: bool = False,
    delete_id: int | None = None,
) -> Denoised:
    """Commits a token in every MASK slot of a batch of responses.

    A row's result does not depend on its neighbors if `predict` keeps rows apart.

    Args:
        predict: the forward pass; called with the rows still running, cut to the longest of them.
        ids: (B, L) int64, MASK in open slots, draft tokens elsewhere. Not changed.
        mask: (B, L) bool, True where a slot exists; rows are right-padded.
        mask_id: id of MASK.
        eos_id: id that ends the text.
        budget: `confidence_threshold` and `max_rounds`; `max_new_tokens` is the width of the canvas, which the caller
            chooses.
        threshold: used where the budget names none.
        prune: when a committed EOS removes itself and all slots right of it.
        verify_threshold: probability in (0, 1]; a draft token that the model gives less in the first round is opened
            in that round. Rows with nothing but draft then run one round too. None trusts the draft.
        verify_committed: verify in every round, committed tokens too; each slot is opened again at most once. A row
            then ends in the round that changes nothing.
        delete_id: id that `text_slots` drops; it is an ordinary token to the loop.
    """
    ids = ids.masked_fill(~mask, eos_id)
    confidence = torch.full(ids.shape, float("nan"), dtype=torch.float64, device=ids.device)
    lengths, rounds = mask.sum(1), torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    running = mask.any(1) if verify_threshold is not None else (mask & (ids == mask_id)).any(1)
    threshold = threshold if budget.confidence_threshold is None else budget.confidence_threshold
    last = budget.max_rounds if budget.max_rounds is not None else 2 * ids.shape[1] + 1
    reopened = torch.zeros_like(mask)
    forwards = 0
    while forwards < last and bool(running.any()):
        rows = running.nonzero().squeeze(1)
        width = int(lengths[rows].max())
        now, sure = ids[rows, :width], confidence[rows, :width]
        alive = torch.arange(width, device=ids.device) < lengths[rows, None]
        still_open = alive & (now == mask_id)
        seen = alive if forwards == 0 or verify_committed else still_open
        logits = predict(now, alive, rows)
        forwards += 1

        token, likely, own = now.clone(), torch.zeros_like(sure), torch.ones_like(sure)
        token[seen], likely[seen], own[seen] = score(logits[seen], now[seen], mask_id)
        if forwards == 1:
            sure = torch.where(alive, own, sure)
        if verify_threshold is not None:
            doubted = alive & ~still_open & (own < verify_threshold) & ~reopened[rows, :width]
            reopened[rows, :width] |= doubted
            still_open |= doubted
        fixed = commit(likely, still_open, threshold) if forwards < last else still_open
        now = torch.where(fixed, token, now.masked_fill(still_open, mask_id))
        sure = torch.where(fixed, likely, sure)

        left = lengths[rows]
        if prune == "every" or (prune == "first" and forwards == 1):
            left = torch.minimum(left, first_index(alive & (now == eos_id)))
        kept = torch.arange(width, device=ids.device) < left[:, None]
        ids[rows, :width] = now.masked_fill(~kept, eos_id)
        confidence[rows, :width] = sure.masked_fill(~kept, float("nan"))
        lengths[rows], rounds[rows] = left, forwards
        # With `verify_committed`, a slot that was just committed waits for a pass that reads it.
        unread = (now == mask_id) | fixed if verify_committed else now == mask_id
        running[rows] = (kept & unread).any(1)
    return Denoised(ids, confidence, lengths, rounds, forwards, eos_id, delete_id)


def sampled(
    predict: Predict,
    ids: Tensor,
    mask: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    budget: DecodeBudget,
    prune: Prune = "every",
    verify_threshold: float | None = None,
    verify_committed: bool = False,
    delete_id: int | None = None,
) -> Sampled:
    """The same by the sampler; see `denoise`."""
    sampler = PriorGuidedSampler(
        threshold=0.9 if budget.confidence_threshold is None else budget.confidence_threshold,
        prune=prune,
        verify_threshold=verify_threshold,
        verify_committed=verify_committed,
    )
    tokens = TokenIds(mask_id, eos_id, delete=delete_id)
    return sample(predict, Canvas(ids, mask), sampler, tokens, max_rounds=budget.max_rounds)
