"""Fewer states per second: average pooling and stacking at a rate chosen per call.

Source: Llama-MTSK (arXiv 2503.06362), section 3.1. A rate r makes one token of r consecutive states, their mean or
their concatenation.

Differs from the published code: there every item has as many tokens as the longest of its batch, so a short one ends in
tokens made of padding, and the last N mod r states of an utterance are dropped (up to 0.3 s at rate 16, a whole word).
Here the last token is the mean of the states that are left, and padding is never read. `whole_windows=True` drops them
as published.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from tokenthrift.mtsk.rates import compressed_length
from tokenthrift.whisper import length_mask

__all__ = ["Compression", "compress"]

Compression: TypeAlias = Literal["average", "stack"]


def compress(
    states: Tensor, lengths: Tensor, rate: int, kind: Compression, *, whole_windows: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens of a padded batch.

    Args:
        states: (B, N, D); what stands after the end of an item is not read.
        lengths: (B,) states of each item.
        rate: states per token, at least 1.
        kind: mean of the states (D wide), or the states one after another (rate * D wide, zeros where they end early).
        whole_windows: drop the states that do not fill a window.

    Returns:
        (B, n, D or rate * D), zero after the end of an item, and (B,) tokens of each item.
    """
    if rate < 1:
        raise ValueError(f"a rate is a number of states per token from 1, not {rate}")
    counts = lengths // rate if whole_windows else -(-lengths // rate)
    size = compressed_length(states.shape[1], rate, whole_windows=whole_windows)
    valid = length_mask(lengths, states.shape[1])
    states = states.masked_fill(~valid[..., None], 0.0)
    missing = size * rate - states.shape[1]
    # A negative padding cuts the states that fill no window.
    windows = F.pad(states, (0, 0, 0, missing)).unflatten(1, (size, rate))
    if kind == "stack":
        tokens = windows.flatten(2)
    else:
        filled = F.pad(valid, (0, missing)).unflatten(1, (size, rate)).sum(2)
        tokens = windows.sum(2) / filled.clamp_min(1)[..., None]
    return tokens.masked_fill(~length_mask(counts, size)[..., None], 0.0), counts
