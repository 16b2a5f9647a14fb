"""Whisper's spectrogram of a short recording filled with silence to 30 seconds, at the cost of the recording alone.

Source: Radford et al. 2022 (arXiv 2212.04356), section 2.2. In numpy, so that Whisper by CTranslate2 does not wait for
PyTorch; openai-whisper and transformers compute the same over 30 seconds, silence included.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tokenthrift.whisper_frames import FOURIER_POINTS, HOP, MAX_STATES, STATE_SAMPLES, mel_filters, states_of

__all__ = ["padded_log_mel"]

_QUIETEST: Final = -10.0  # the logarithm of what silence is raised to
_RANGE: Final = 8.0


def padded_log_mel(samples: NDArray[np.float32], bins: int, length: int = MAX_STATES) -> NDArray[np.float32]:
    """The log-mel spectrogram of a recording followed by silence, up to 30 s.

    Args:
        samples: `(n,)` mono at 16 kHz, at most 30 s.
        bins: of the checkpoint, 80 or 128.
        length: encoder states to fill, no fewer than the recording has.

    Returns:
        `(bins, 2 * length)`.
    """
    # Two more states hold all frames that overlap both the recording and the silence.
    states = min(states_of(len(samples)) + 2, length)
    filled = np.pad(samples, (0, states * STATE_SAMPLES - len(samples)))
    frames = sliding_window_view(np.pad(filled, FOURIER_POINTS // 2, mode="reflect"), FOURIER_POINTS)[:-HOP:HOP]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FOURIER_POINTS) / FOURIER_POINTS)).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(frames * window, axis=1))).astype(np.float32)
    logs = np.log10(np.maximum(mel_filters(bins) @ power.T, 1e-10))
    least = max(_QUIETEST, float(logs.max()) - _RANGE)
    mel = np.full((bins, 2 * length), (least + 4) / 4, dtype=np.float32)
    mel[:, : logs.shape[1]] = (np.maximum(logs, least) + 4) / 4
    return mel
