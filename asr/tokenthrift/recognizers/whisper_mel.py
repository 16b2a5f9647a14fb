"""Whisper's spectrogram of a short recording filled with silence to 30 seconds, at the cost of the recording alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokenthrift.whisper import MAX_STATES, STATE_SAMPLES, log_mel

__all__ = ["padded_log_mel"]

_QUIETEST = -10.0  # the logarithm of what silence is raised to
_RANGE = 8.0


def padded_log_mel(samples: Tensor, bins: int) -> Tensor:
    """`log_mel` of a recording followed by silence up to 30 s.

    Args:
        samples: `(n,)` mono at 16 kHz, at most 30 s.
        bins: of the checkpoint, 80 or 128.

    Returns:
        `(bins, 3000)`.
    """
    most = MAX_STATES * STATE_SAMPLES
    # Two more states hold all frames that overlap both the recording and the silence.
    short = log_mel(F.pad(samples, (0, min(2 * STATE_SAMPLES, most - len(samples)))), bins)
    loudest = 4.0 * float(short.max()) - 4.0
    silence = (max(_QUIETEST, loudest - _RANGE) + 4.0) / 4.0
    return F.pad(short, (0, 2 * MAX_STATES - short.shape[1]), value=silence)
