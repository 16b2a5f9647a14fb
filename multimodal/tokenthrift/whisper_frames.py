"""How much Whisper reads of how much sound, and its mel filters, for code that runs no network.

Source: Radford et al. 2022 (arXiv 2212.04356), section 2.2; the filters are those of Slaney's Auditory Toolbox. Nothing
here imports PyTorch or transformers, which take seconds to start.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["FOURIER_POINTS", "HOP", "MAX_STATES", "SAMPLE_RATE", "STATE_SAMPLES", "mel_filters", "states_of"]

SAMPLE_RATE = 16_000
FOURIER_POINTS = 400
HOP = 160  # samples per mel frame
STATE_SAMPLES = 2 * HOP  # samples per encoder state: 50 states a second
MAX_STATES = 1_500  # 30 seconds


def states_of(samples: int) -> int:
    """Encoder states that a recording of so many samples at 16 kHz has (at least one)."""
    return max(1, -(-samples // STATE_SAMPLES))


@cache
def mel_filters(bins: int) -> NDArray[np.float32]:
    """Slaney's mel filters from 0 to 8 kHz.

    Returns:
        `(bins, 201)`, each of unit area.
    """
    # Linear up to 1 kHz, which is mel 15; from there on 27 mel are a factor of 6.4.
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mel = np.linspace(0, top, bins + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    hertz = np.linspace(0, SAMPLE_RATE / 2, FOURIER_POINTS // 2 + 1)
    up = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return np.asarray(np.maximum(0, np.minimum(up, down)) * area[:, None], dtype=np.float32)
