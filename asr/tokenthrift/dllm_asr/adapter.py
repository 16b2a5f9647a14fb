"""Encoder states to the memory of the language model: fewer, and of its width.

Source: dLLM-ASR (arXiv 2601.17902): 2x average pooling to 25 states a second, a convolution of kernel 3 and stride 2 to
12.5, then a linear map to the width of the language model. What differs: padding is masked at both steps, so a row of a
batch equals the row alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.padding import length_mask
from tokenthrift.reducers.pooling import pool_by_rate

__all__ = ["Adapter", "adapted_length"]


def adapted_length(states: int, config: AdapterConfig) -> int:
    """Memory positions that so many encoder states become."""
    pooled = -(-states // config.pool)
    return -(-pooled // config.stride)


class Adapter(nn.Module):
    """Pooling, and where the stride is above 1 a convolution and a projection.

    Args:
        config: the two rates.
        hidden_size: width of the encoder.
        memory_size: width of the language model.
    """

    def __init__(self, config: AdapterConfig, hidden_size: int, memory_size: int) -> None:
        super().__init__()
        self.config = config
        self.rate = config.pool * config.stride
        has_conv = config.stride > 1
        self.conv = nn.Conv1d(hidden_size, hidden_size, 3, config.stride, padding=1) if has_conv else None
        self.projection = nn.Linear(hidden_size, memory_size) if has_conv else None

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder states `(B, N, hidden_size)` to memory `(B, M, memory_size)` and its mask `(B, M)`."""
        memory, lengths = pool_by_rate(states, lengths, self.config.pool)
        if self.conv is not None and self.projection is not None:
            memory = self.projection(F.gelu(self.conv(memory.transpose(1, 2))).transpose(1, 2))
            lengths = -(-lengths // self.config.stride)
        return memory, length_mask(lengths, memory.shape[1])
