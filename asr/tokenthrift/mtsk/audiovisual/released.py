"""What the authors' code does differently, for `compat="released"`: how Whisper is fed and how long its output is.

Source: Llama-AVSR and Omni-AVSR, as described in the system's notes. Each waveform is layer-normed, Whisper encodes 30
seconds of it and silence, and every item keeps as many states as the longest of its batch has, 25 at least. The other
differences are one line each where they belong: no masks in the encoders, whole windows only, markers and `<pad>` as
the last rows of the language model's table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.mtsk.planning import audio_states
from tokenthrift.whisper import MAX_STATES, STATE_SAMPLES, log_mel

__all__ = ["released_lengths", "released_mels"]


def released_mels(audio: Sequence[Tensor], bins: int) -> list[Tensor]:
    """Log-mel spectrograms (bins, 3000) of layer-normed waveforms, filled up to 30 s."""
    whole = MAX_STATES * STATE_SAMPLES
    return [log_mel(F.pad(F.layer_norm(row.float(), row.shape), (0, whole - len(row))), bins) for row in audio]


def released_lengths(samples: Sequence[int], device: torch.device) -> Tensor:
    """(B,) states of each item: as many as the longest has, whatever its own length."""
    return torch.full((len(samples),), audio_states(max(samples), released=True), device=device)
