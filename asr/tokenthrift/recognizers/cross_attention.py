"""Times of tokens from the cross-attention of an encoder-decoder, by dynamic time warping.

Source: openai-whisper's `timing.py` (the heads that follow the audio, normalized and smoothed over time, averaged, and
the cheapest monotone path through them). What differs: the path is found diagonal by diagonal in numpy instead of cell
by cell in numba, and heads are all those of the upper half of the layers where `generation_config` names none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["align", "warp"]

_STATE_SECONDS = 0.02
_SMOOTH = 7


def align(model: Any, states: Tensor, ids: Tensor, prompt: int, frames: int) -> list[tuple[float, float]]:
    """Start and end of each token that was written.

    Args:
        model: a Whisper of transformers.
        states: `(1, N, D)` from its encoder.
        ids: `(1, prompt + written + 1)`; the last one ends the text.
        prompt: how many of them were given.
        frames: how many of the states are of the recording and not of the silence after it.

    Returns:
        Seconds from the start of the recording, in order, one pair for each written token.
    """
    weights = _attention(model, states, ids, frames)
    # The row of a position says where the decoder looks when it writes the next token.
    weights = weights[:, prompt - 1 : -1].softmax(-1)
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = (weights - mean) / deviation.clamp(min=1e-6)
    if frames > _SMOOTH // 2:
        padded = torch.nn.functional.pad(weights, (_SMOOTH // 2, _SMOOTH // 2), mode="reflect")
        weights = padded.unfold(-1, _SMOOTH, 1).median(-1).values
    rows, columns = warp(-weights.mean(0).double().cpu().numpy())
    first = np.r_[True, np.diff(rows) > 0]
    starts = columns[first] * _STATE_SECONDS
    ends = np.r_[starts[1:], frames * _STATE_SECONDS]
    return [(float(a), float(b)) for a, b in zip(starts, ends, strict=True)][: ids.shape[1] - prompt - 1]


def _attention(model: Any, states: Tensor, ids: Tensor, frames: int) -> Tensor:
    """`(heads, positions, frames)` logarithms of attention weights of the heads that follow the audio."""
    from transformers.modeling_outputs import BaseModelOutput

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels keep no weights
    try:
        out = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=ids,
            output_attentions=True,
            use_cache=False,
        )
    finally:
        model.set_attn_implementation(before)
    layers = out.cross_attentions
    chosen = getattr(model.generation_config, "alignment_heads", None)
    if chosen:
        weights = torch.stack([layers[layer][0, head] for layer, head in chosen])
    else:
        weights = torch.cat([layer[0] for layer in layers[len(layers) // 2 :]])
    return weights[..., :frames].float().clamp(min=1e-12).log()


def warp(cost: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cheapest path from the first corner of `(n, m)` costs to the last, by steps right, down or both.

    Returns:
        Rows and columns of the path.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    move = np.zeros((n + 1, m + 1), dtype=np.int8)
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        options = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        best = options.argmin(0)
        total[i, j] = cost[i - 1, j - 1] + np.take_along_axis(options, best[None], 0)[0]
        move[i, j] = best
    i, j = n, m
    path = []
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        step = move[i, j]
        i, j = i - (step != 2), j - (step != 1)
    rows, columns = np.array(path[::-1], dtype=np.int64).T
    return rows, columns
