"""The forward process of masked diffusion and its loss: mask a random share of a response and predict it.

Source: LLaDA (arXiv 2502.09992, section 2.2 and its guidelines) for the process, the 1/t weight and EOS padding as
target; dLLM-ASR (arXiv 2601.17902) for the fully masked share. A row draws a rate p = (1 - eps) t + eps with
t ~ U(0, 1), masks each slot with probability p, and its loss is the cross-entropy of masked slots divided by p and by
the length of its response. The batch mean of that bounds the negative log-likelihood per token.

Differs from the published training: visible tokens may be substituted, with a cross-entropy of their own, because a
decoder that starts from a draft must learn to doubt what it sees. In the published process only masked slots are ever
wrong; a draft is wrong where its confidence is high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Corrupted", "corrupt", "diffusion_loss", "mask_rate", "substitute", "time_mask"]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A batch of responses after the forward process.

    Attributes:
        ids: (B, L) int64, what the model sees.
        masked: (B, L) bool, slots that hold MASK.
        rates: (B,) float32, the probability with which a slot of the row was masked.
    """

    ids: Tensor
    masked: Tensor
    rates: Tensor

    def to(self, device: torch.device | str) -> Corrupted:
        """The batch on another device."""
        return Corrupted(self.ids.to(device), self.masked.to(device), self.rates.to(device))


def mask_rate(u: float, *, fully_masked_prob: float = 0.2, eps: float = 1e-3) -> float:
    """The masking rate of a response.

    Args:
        u: uniform random number in [0, 1).
        fully_masked_prob: probability that the rate is 1, so that decoding from nothing but MASK is trained.
        eps: lowest rate; it bounds the weight 1 / rate.

    Returns:
        A number in [eps, 1].

    Raises:
        ValueError: a probability outside of [0, 1].
    """
    if not 0.0 <= fully_masked_prob <= 1.0:
        raise ValueError(f"fully_masked_prob must be from 0 to 1, got {fully_masked_prob}")
    t = min(1.0, u / max(1.0 - fully_masked_prob, eps))
    return (1.0 - eps) * t + eps


def corrupt(ids: Tensor, rate: float, *, mask_id: int, generator: torch.Generator | None = None) -> Tensor:
    """Masks each slot of a response with the same probability.

    Args:
        ids: (L,) int64 true tokens, EOS padding that the model has to predict included.
        rate: probability, from `mask_rate`.
        mask_id: id of MASK.
        generator: source of randomness, on the device of `ids`.
    """
    return ids.masked_fill(torch.rand(ids.shape, generator=generator, device=ids.device) < rate, mask_id)


def substitute(
    ids: Tensor, where: Tensor, probability: float, substitutes: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draws each of the given slots anew with some probability: likely mistakes in place of visible tokens.

    Args:
        ids: (..., L) int64. Not changed.
        where: (..., L) bool, slots that may be drawn.
        probability: chance of a draw; the draw may give the token that was there.
        substitutes: distribution of the draw: (V,) weights of tokens, or (V, V) weights of mistakes, row = true token.
            Rows must not be all zero.
        generator: source of randomness, on the device of `ids`.

    Returns:
        (..., L) int64.
    """
    drawn = where & (torch.rand(ids.shape, generator=generator, device=ids.device) < probability)
    truth = ids[drawn]
    if not len(truth):
        return ids.clone()
    weights = substitutes[truth] if substitutes.dim() == 2 else substitutes.expand(len(truth), -1)
    return ids.masked_scatter(drawn, torch.multinomial(weights, 1, generator=generator).squeeze(1))


def diffusion_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, corrupted: Corrupted, *, visible_weight: float = 0.0
) -> Tensor:
    """The weighted cross-entropy of a batch.

    Args:
        logits: (B, L, V), row i speaks about slot i.
        targets: (B, L) int64 true tokens; never MASK where `mask` is True.
        mask: (B, L) bool, slots that take part. What stands elsewhere, NaN included, never contributes.
        corrupted: what the model saw.
        visible_weight: weight of the plain cross-entropy of visible slots, which trains to keep right tokens and to
            replace wrong ones; 0 is the published loss.

    Returns:
        Scalar: per row the sum over masked slots of CE / rate (plus `visible_weight` times CE over visible ones)
        divided by the slots of the row, averaged over the batch. Nats per token.
    """
    length = mask.sum(1, keepdim=True).clamp(min=1)
    weights = torch.where(corrupted.masked, 1.0 / corrupted.rates.unsqueeze(1), visible_weight) / length
    used = mask & (weights > 0)
    losses = functional.cross_entropy(logits[used].float(), targets[used], reduction="none")
    return (losses * weights[used]).sum() / len(mask)


def time_mask(states: Tensor, lengths: Tensor, share: float, seeds: Sequence[int], *, longest: int = 15) -> Tensor:
    """Encoder states with random spans set to zero; the spans of a row depend on its length and seed alone.

    Source: the time masks of SpecAugment (Park et al., 2019), on encoder states instead of spectrogram frames. Cached
    states are the same in every epoch, and a model of this size memorizes them.

    Args:
        states: (B, N, hidden_size).
        lengths: (B,) int64, states of each row.
        share: of a row's states to mask about, in [0, 1).
        seeds: of the spans of each row.
        longest: states of the longest span; lengths are uniform from 1 to it.

    Returns:
        (B, N, hidden_size), a copy.
    """
    masked = torch.zeros(states.shape[:2], dtype=torch.bool)
    for row, (length, seed) in enumerate(zip(lengths.tolist(), seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        spans = round(length * share * 2 / (longest + 1))
        starts = torch.randint(max(1, length), (spans,), generator=generator).tolist()
        sizes = torch.randint(1, longest + 1, (spans,), generator=generator).tolist()
        for start, size in zip(starts, sizes, strict=True):
            masked[row, start : start + size] = True
    return states.masked_fill(masked[..., None].to(states.device), 0.0)
