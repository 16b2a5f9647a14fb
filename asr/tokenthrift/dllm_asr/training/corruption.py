"""The forward process of masked diffusion and its loss: hide a random share of a response and ask for it back.

Source: LLaDA (arXiv 2502.09992, section 2.2 and its guidelines) for the process, the 1/t weight and EOS padding as
target; dLLM-ASR (arXiv 2601.17902) for the fully masked share. A row draws a rate p = (1 - eps) t + eps with
t ~ U(0, 1), hides each slot with probability p, and pays the cross-entropy of hidden slots divided by p and by the
length of its response; the batch mean of that bounds the negative log-likelihood per token.

Differs from the published training: t is stratified over the batch (one draw per equal slice of (0, 1), rows shuffled),
which leaves every row's t uniform and the loss unbiased but removes most of its variance across batches; and visible
tokens may be substituted, with their own cross-entropy, because a decoder that starts from a draft must learn to doubt
what it sees (only masked slots are ever wrong in the published process, while a draft is wrong where it looks certain).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Corrupted", "corrupt", "diffusion_loss", "hide_spans", "mask_rates", "substitute"]


@dataclass(frozen=True, slots=True)
class Corrupted:
    """A batch of responses after the forward process.

    Attributes:
        ids: (B, L) int64, what the model sees.
        masked: (B, L) bool, slots that hold MASK.
        rates: (B,) float32, the probability with which a slot of the row was hidden.
    """

    ids: Tensor
    masked: Tensor
    rates: Tensor


def mask_rates(
    rows: int, *, fully_masked: float = 0.2, eps: float = 1e-3, generator: torch.Generator | None = None
) -> Tensor:
    """Draws one masking rate per row, stratified over the batch.

    Args:
        rows: size of the batch.
        fully_masked: share of rows, in [0, 1], whose rate is 1, so that decoding from nothing but MASK is practised.
        eps: lowest rate; it bounds the weight 1 / rate.
        generator: source of randomness; the rates come on its device.

    Returns:
        (rows,) float32 in [eps, 1].

    Raises:
        ValueError: a share outside of [0, 1].
    """
    if not 0.0 <= fully_masked <= 1.0:
        raise ValueError(f"fully_masked must be a share from 0 to 1, got {fully_masked}")
    device = generator.device if generator is not None else None
    jitter = torch.rand(rows, generator=generator, device=device)
    slices = torch.randperm(rows, generator=generator, device=device)
    u = (slices + jitter) / rows
    t = (u / max(1.0 - fully_masked, eps)).clamp(max=1.0)
    return (1.0 - eps) * t + eps


def corrupt(
    ids: Tensor, mask: Tensor, rates: Tensor, *, mask_id: int, generator: torch.Generator | None = None
) -> Corrupted:
    """Hides each slot with its row's rate.

    Args:
        ids: (B, L) int64 true tokens, EOS padding that the model has to predict included.
        mask: (B, L) bool, slots that take part; others keep their id.
        rates: (B,) float, from `mask_rates`.
        mask_id: id of MASK.
        generator: source of randomness, on the device of `ids`.
    """
    rates = rates.to(ids.device)
    masked = mask & (torch.rand(ids.shape, generator=generator, device=ids.device) < rates.unsqueeze(1))
    return Corrupted(ids.masked_fill(masked, mask_id), masked, rates)


def substitute(
    ids: Tensor, where: Tensor, probability: float, substitutes: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draws each of the given slots anew with some probability: likely mistakes in place of visible tokens.

    Args:
        ids: (B, L) int64. Not changed.
        where: (B, L) bool, slots that may be drawn.
        probability: chance of a draw; the draw may give the token that was there.
        substitutes: distribution of the draw: (V,) weights of tokens, or (V, V) weights of mistakes, row = true token.
            Rows must not be all zero.
        generator: source of randomness, on the device of `ids`.

    Returns:
        (B, L) int64.
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
        visible_weight: weight of the plain cross-entropy of visible slots, which teaches to keep right tokens and to
            doubt wrong ones; 0 is the published loss.

    Returns:
        Scalar: per row the sum over hidden slots of CE / rate (plus `visible_weight` times CE over visible ones)
        divided by the slots of the row, averaged over the batch. Nats per token.
    """
    length = mask.sum(1, keepdim=True).clamp(min=1)
    weights = torch.where(corrupted.masked, 1.0 / corrupted.rates.unsqueeze(1), visible_weight) / length
    used = mask & (weights > 0)
    losses = functional.cross_entropy(logits[used].float(), targets[used], reduction="none")
    return (losses * weights[used]).sum() / len(mask)


def hide_spans(states: Tensor, lengths: Tensor, share: float, *, longest: int = 15, seed: int = 0) -> Tensor:
    """Encoder states with random spans set to zero, so that words must be told from their surroundings at times.

    Source: the time masks of SpecAugment (Park et al., 2019), on encoder states instead of spectrogram frames. Cached
    states are the same in every epoch; with them a model of this size learns its sentences by heart.

    Args:
        states: (B, N, width).
        lengths: (B,) int64, states of each row.
        share: of a row's states to hide about, in [0, 1).
        longest: states of the longest span; lengths are uniform from 1 to it.
        seed: of the spans.

    Returns:
        (B, N, width), a copy.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.zeros(states.shape[:2], dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        spans = round(length * share * 2 / (longest + 1))
        starts = torch.randint(max(1, length), (spans,), generator=generator).tolist()
        widths = torch.randint(1, longest + 1, (spans,), generator=generator).tolist()
        for start, width in zip(starts, widths, strict=True):
            hidden[row, start : start + width] = True
    return states.masked_fill(hidden[..., None].to(states.device), 0.0)
