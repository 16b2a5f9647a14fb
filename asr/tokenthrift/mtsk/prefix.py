"""The states of Llama-MTSK's encoders in front of a language model: see `tokenthrift.prefixes`.

Source: Llama-MTSK (arXiv 2503.06362), section 3.1: encoder states, averaged to a rate. What differs: the rate follows
from the budget of each item, and the projector belongs to whichever language model reads.
"""

from __future__ import annotations

from typing import Literal

from tokenthrift.budget import ItemSize
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.planning import SAMPLE_RATE, audio_states
from tokenthrift.prefixes import StatesPrefix

__all__ = ["MtskPrefix"]


class MtskPrefix(StatesPrefix):
    """Recordings as states of the audio encoder, or mouth crops as states of the visual one.

    An audio item is (samples,) at 16 kHz, a lips item (T, H, W) crops at 25 frames a second; see `LlamaMtsk.encode`.

    Args:
        model: whose encoders are used.
        kind: which of the two.

    Raises:
        ValueError: the model has no such encoder.
    """

    def __init__(self, model: LlamaMtsk, kind: Literal["audio", "lips"] = "audio") -> None:
        config = {"audio": model.config.audio, "lips": model.config.video}.get(kind)
        if config is None:
            raise ValueError(f"this model has no encoder for {kind}")
        encode = model.encode_audio if kind == "audio" else model.encode_video
        super().__init__(kind, config.hidden_size, encode, _audio if kind == "audio" else _lips)


def _audio(size: ItemSize) -> int:
    return audio_states(round(size.require("seconds") * SAMPLE_RATE))


def _lips(size: ItemSize) -> int:
    frames: int = size.require("frames")
    return frames
