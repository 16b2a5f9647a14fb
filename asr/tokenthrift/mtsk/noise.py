"""How noisy a recording is, from the recording alone.

Not in Llama-MTSK (arXiv 2503.06362), whose rates are fixed by hand; the table of a model says which rates serve which
noise best, and this tells which line of it applies. Energy only: the quietest fifth of the frames is taken for noise,
what the rest has above it for speech. It needs pauses, so noise that sounds only under the speech goes unnoticed, and
babble with pauses of its own is taken for somewhat less than it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["estimate_snr"]

_FRAME = 400  # 25 ms
_LIMITS = (-10.0, 40.0)


def estimate_snr(samples: Tensor) -> float:
    """Signal-to-noise ratio in dB of speech-active frames, between -10 and 40.

    Args:
        samples: (n,) mono at 16 kHz. Less than a tenth of a second is taken for clean.
    """
    frames = samples[: len(samples) // _FRAME * _FRAME].float().view(-1, _FRAME)
    if len(frames) < 4:
        return _LIMITS[1]
    power = frames.square().mean(1).sort().values
    noise = power[: max(1, len(power) // 5)].mean()
    speech = power[len(power) // 2 :].mean() - noise
    ratio = 10 * torch.log10(speech.clamp_min(1e-12) / noise.clamp_min(1e-12))
    return min(max(float(ratio), _LIMITS[0]), _LIMITS[1])
