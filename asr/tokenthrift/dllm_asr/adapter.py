"""Encoder states to the memory of the language model: fewer, and of its width.

Source: dLLM-ASR (arXiv 2601.17902): 2x average pooling to 25 states a second, a convolution of kernel 3 and stride 2 to
12.5, then a linear map to the width of the language model. What differs: padding is masked at both steps, so a row of a
batch equals the row alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.whisper import length_mask

__all__ = ["Adapter", "adapted_length", "pool_states"]


def adapted_length(states: int, config: AdapterConfig) -> int:
    """Memory positions that so many encoder states become; the price of a recording before it is run."""
    pooled = -(-states // config.pool)
    return -(-pooled // config.stride)


def pool_states(states: Tensor, lengths: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Averages runs of `pool` states; the last run of a recording averages what it has.

    Args:
        states: `(B, N, D)`; what stands after the end of a recording is not read.
        lengths: `(B,)`.
        pool: states in a run.

    Returns:
        `(B, ceil(N / pool), D)`, zero after the end of each recording, and the new lengths.
    """
    valid = length_mask(lengths, states.shape[1])
    states = states.masked_fill(~valid[..., None], 0.0)
    if pool == 1:
        return states, lengths
    fill = -states.shape[1] % pool
    runs = F.pad(states, (0, 0, 0, fill)).unflatten(1, (-1, pool)).sum(2)
    counts = F.pad(valid, (0, fill)).unflatten(1, (-1, pool)).sum(2)
    return runs / counts.clamp(min=1)[..., None], torch.ceil(lengths / pool).long()


class Adapter(nn.Module):
    """Pooling, and where the stride is above 1 a convolution and a projection.

    Args:
        config: the two rates.
        width: width of the encoder.
        memory_size: width of the language model.
    """

    def __init__(self, config: AdapterConfig, width: int, memory_size: int) -> None:
        super().__init__()
        self.config = config
        self.rate = config.pool * config.stride
        self.conv = nn.Conv1d(width, width, 3, config.stride, padding=1) if config.stride > 1 else None
        self.projection = nn.Linear(width, memory_size) if config.stride > 1 else None

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states `(B, N, width)` to memory `(B, M, memory_size)`, and the mask `(B, M)` of what exists."""
        memory, lengths = pool_states(states, lengths, self.config.pool)
        if self.conv is not None and self.projection is not None:
            memory = self.projection(F.gelu(self.conv(memory.transpose(1, 2))).transpose(1, 2))
            lengths = torch.ceil(lengths / self.config.stride).long()
        return memory, length_mask(lengths, memory.shape[1])
