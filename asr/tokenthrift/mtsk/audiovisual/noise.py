"""Speech with noise at a stated level, and the level of noise in a recording from the recording alone.

Source of the mixing: the training of Llama-MTSK (arXiv 2503.06362). What differs: 0 dB means 0 dB (the published code
tests the target for truth, so that 0 draws a random level), and the level is measured where there is speech and not in
the pauses.

`estimate_snr` is not in the paper, whose rates are fixed by hand; the table of a model says which rates serve which
noise best, and the estimate tells which line of it applies. It uses energy only: the quietest fifth of the frames is
taken for noise, what the rest has above it for speech. It needs pauses, so it does not notice noise that sounds only
under the speech, and it underestimates babble with pauses of its own.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["active", "estimate_snr", "mix", "snr_of"]

_FRAME = 400  # 25 ms
_LIMITS = (-10.0, 40.0)
_WINDOW: Final = 320  # 20 ms
_QUIET: Final = 1e-4  # a window 40 dB below the loudest is no speech


def active(speech: Tensor) -> Tensor:
    """(n,) bool, where a recording (n,) is within 40 dB of its loudest 20 ms; all true where all is silence."""
    padded = F.pad(speech, (0, -len(speech) % _WINDOW)).unflatten(0, (-1, _WINDOW))
    power = padded.square().mean(1)
    loud = power >= _QUIET * power.max()
    where: Tensor = loud.repeat_interleave(_WINDOW)[: len(speech)]
    return where


def snr_of(speech: Tensor, noise: Tensor) -> float:
    """Decibels by which speech (n,) is above noise (n,), over the samples where there is speech."""
    where = active(speech)
    ratio = speech[where].double().square().mean() / noise[where].double().square().mean()
    return float(10 * ratio.log10())


def mix(speech: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Speech with noise at a level.

    Args:
        speech: (n,) samples.
        noise: (m,) samples with m from 1, repeated or cut to n.
        snr: decibels by which the speech is louder, where there is speech.

    Returns:
        (n,) the sum; silence, as speech or as noise, leaves the speech as it is.
    """
    noise = noise.repeat(-(-len(speech) // len(noise)))[: len(speech)]
    if not speech.any() or not noise[active(speech)].any():
        return speech
    gain = 10 ** ((snr_of(speech, noise) - snr) / 20)
    return speech + gain * noise


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
