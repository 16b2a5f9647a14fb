"""Encoder states to the memory of the language model: fewer, and of its width.

Source: dLLM-ASR (arXiv 2601.17902): 2x average pooling to 25 states a second, a convolution of kernel 3 and stride 2 to
12.5, then a linear map to the width of the language model. What differs: the rate of the pooling may be another for
each recording (see `rates`), and padding is masked at both steps, so a row of a batch equals the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.rates import Rate
from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.reducers.pooling import pool_by_rate

__all__ = ["Adapter"]


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
        has_conv = config.stride > 1
        self.conv = nn.Conv1d(hidden_size, hidden_size, 3, config.stride, padding=1) if has_conv else None
        self.projection = nn.Linear(hidden_size, memory_size) if has_conv else None

    def forward(
        self, states: Tensor, lengths: Tensor, rates: int | Sequence[Rate] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encoder states `(B, N, hidden_size)` to memory `(B, M, memory_size)` and its mask `(B, M)`.

        Args:
            states: what stands after the end of a recording is not read.
            lengths: `(B,)` states of each recording.
            rates: encoder states that are averaged to one, for all recordings; or the rate of each; None for the
                pooling of the configuration.
        """
        if rates is None or isinstance(rates, int):
            memory, lengths = pool_by_rate(states, lengths, rates or self.config.pool)
        else:
            memory, lengths = self._pool_each(states, lengths, rates)
        if self.conv is not None and self.projection is not None:
            memory = self.projection(F.gelu(self.conv(memory.transpose(1, 2))).transpose(1, 2))
            lengths = -(-lengths // self.config.stride)
        return memory, length_mask(lengths, memory.shape[1])

    def _pool_each(self, states: Tensor, lengths: Tensor, rates: Sequence[Rate]) -> tuple[Tensor, Tensor]:
        rows = []
        for row, n, rate in zip(states, lengths.tolist(), rates, strict=True):
            pooled = pool_by_rate(row[None, :n], lengths.new_tensor([n]), rate.pool)[0][0]
            most = rate.positions * self.config.stride
            if len(pooled) > most:  # the states that are left belong to the last position
                last = row[(most - 1) * rate.pool : n].mean(0, keepdim=True)
                pooled = torch.cat([pooled[: most - 1], last])
            rows.append(pooled)
        memory, _ = pad_rows(rows)
        return memory, lengths.new_tensor([len(row) for row in rows])
