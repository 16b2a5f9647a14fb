"""What a forward pass says about each slot: a candidate token and how sure the model is of it.

Sources: LLaDA's `generate.py` (Gumbel noise in float64, arXiv 2409.02908; guidance; the two EOS options; random
remasking); Fast-dLLM (softmax in float64); Dream (margin and entropy as confidence); DAEDAL (a slot that predicts MASK
is passed over).

Differs from the published code: MASK is no candidate unless an option says so; the noise is added in the logarithm,
which has the same largest entry and does not overflow; only undecided slots are scored; a row can draw from a generator
of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.loop import Generators, TokenIds

__all__ = ["MaskToken", "Remasking", "Scoring", "entropy", "guide", "score", "uniform"]

MaskToken = Literal["renormalize", "skip", "allow"]
"""What becomes of MASK as a candidate.

"renormalize": it is none, and the other probabilities share its own. "skip": a slot that predicts MASK is left open.
"allow": as published by LLaDA and Fast-dLLM, where such a slot counts as decided and stays MASK.
"""

Remasking = Literal["low_confidence", "random", "margin", "entropy"]
"""What says which slots stay undecided: the probability of the candidate, a random number, how far the most probable
token is ahead of the next, or the entropy of all."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How slots are scored."""

    temperature: float = 0.0
    """Of the Gumbel noise on the logits; 0 takes the most probable token."""
    remasking: Remasking = "low_confidence"
    mask_token: MaskToken = "renormalize"
    wide: bool = True
    """Softmax in float64; half of a well-trained model's confidences round to 1 in half precision."""
    logits_eos_inf: bool = False
    """EOS is never predicted."""
    confidence_eos_eot_inf: bool = False
    """EOS and EOT may be predicted, and are committed after everything else."""
    eos_noise_quirk: bool = False
    """With noise, the published `confidence_eos_eot_inf` leaves EOS its confidence."""


def score(
    logits: Tensor, tokens: TokenIds, scoring: Scoring, noise: Tensor | None = None, random: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates and confidences of slots.

    Args:
        logits: (S, vocab); not changed.
        tokens: the special ids.
        scoring: how.
        noise: (S, vocab) uniform numbers, needed where there is a temperature.
        random: (S,) uniform numbers, needed for random remasking.

    Returns:
        (S,) int64 candidate, the lower id among equals, and (S,) confidence; -inf where `mask_token` skips a slot.

    Raises:
        ValueError: a vocabulary of one token, which is MASK.
    """
    if logits.shape[-1] < 2:
        raise ValueError("a vocabulary needs a token besides MASK")
    plain = logits.to(torch.float64, copy=True) if scoring.wide else logits.clone()
    if scoring.mask_token == "renormalize":
        plain[:, tokens.mask] = -torch.inf
    if scoring.logits_eos_inf:
        plain[:, tokens.eos] = -torch.inf
    noisy = plain
    if scoring.temperature > 0:
        assert noise is not None
        noisy = plain.double() - scoring.temperature * (-noise.log()).log()
    token = noisy.argmax(-1)
    if scoring.mask_token == "renormalize":
        # Where every other token is impossible too, the first of all is the largest, and it may be MASK.
        token = torch.where(token == tokens.mask, int(tokens.mask == 0), token)
    if scoring.confidence_eos_eot_inf:
        if not (scoring.eos_noise_quirk and scoring.temperature > 0):
            plain[:, tokens.eos] = -torch.inf
        if tokens.eot is not None:
            plain[:, tokens.eot] = -torch.inf
    if scoring.remasking == "random":
        assert random is not None
        confidence = random.to(plain.dtype)
    elif scoring.remasking == "low_confidence":
        confidence = plain.softmax(-1).gather(1, token[:, None]).squeeze(1)
    elif scoring.remasking == "margin":
        top = plain.softmax(-1).topk(2).values
        confidence = top[:, 0] - top[:, 1]
    else:
        confidence = -entropy(plain)
    if scoring.mask_token == "skip":
        confidence = confidence.masked_fill(token == tokens.mask, -torch.inf)
    return token, confidence


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis; impossible tokens add nothing."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: (2R, ...) logits, conditional half first, to (R, ...)."""
    conditional, free = logits.chunk(2)
    return free + (scale + 1) * (conditional - free)


def uniform(
    generators: Generators,
    rows: Tensor,
    lengths: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Uniform numbers in [0, 1), of shape (R, W, ...).

    Args:
        generators: one for all, which fills the shape in order; or one for each row of the batch, which fills as many
            slots as the row has, so that a row draws the same whatever its neighbors.
        rows: (R,) rows of the batch.
        lengths: (R,) slots of each row.
        shape: R, W and what follows.
        dtype: of the result.
        device: of the result.
    """
    if isinstance(generators, torch.Generator) or generators is None:
        return torch.rand(tuple(shape), generator=generators, dtype=dtype, device=device)
    drawn = torch.full(tuple(shape), 0.5, dtype=dtype, device=device)
    for at, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        own = torch.rand((length, *shape[2:]), generator=generators[row], dtype=dtype, device=device)
        drawn[at, :length] = own
    return drawn
