"""The states of dLLM-ASR's encoder in front of a language model: see `tokenthrift.prefixes`.

Source: dLLM-ASR (arXiv 2601.17902), whose adapter pools Whisper states to one rate. What differs: the budget of each
item decides how far its states are pooled, and the projector belongs to whichever language model reads.
"""

from __future__ import annotations

from typing import Literal

from tokenthrift.budget import ItemSize
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.prefixes import StatesPrefix
from tokenthrift.whisper import SAMPLE_RATE, states_of

__all__ = ["DllmAsrPrefix"]


class DllmAsrPrefix(StatesPrefix):
    """Recordings (samples,) at 16 kHz as encoder states.

    Args:
        model: whose encoder is used.
        kind: there is one.
    """

    def __init__(self, model: DllmAsr, kind: Literal["audio"] = "audio") -> None:
        if kind != "audio":
            raise ValueError(f"this model has no encoder for {kind}")
        super().__init__(kind, model.config.encoder.hidden_size, model.encode, _native)


def _native(size: ItemSize) -> int:
    return states_of(round(size.require("seconds") * SAMPLE_RATE))
