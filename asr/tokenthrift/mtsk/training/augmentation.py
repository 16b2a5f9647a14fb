"""Noise at a stated level, rooms, and masks in time, each a pure function of its inputs and a seeded generator.

Source: the training of Llama-MTSK (arXiv 2503.06362): babble at an SNR drawn from {-5, 0, 5, 10, 15, 20, clean},
up to 0.4 s of every started second of audio and 10 of every started 25 frames masked, an 88-pixel crop anywhere in the
96-pixel frame. What differs: 0 dB means 0 dB (the published code tests the target for truth, so that 0 draws a random
level), the level counts where there is speech and not in the pauses, masked frames are mean gray, which the encoder
reads as zeros (there they are black), and recorded noises and rooms are used beside babble.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from torch import Tensor

from tokenthrift import extras
from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk.audiovisual.lips import MEAN_GRAY
from tokenthrift.mtsk.audiovisual.noise import mix

__all__ = ["TRAINING_SNRS", "Augmentation", "mask_audio", "mask_video"]

TRAINING_SNRS: Final[tuple[float | None, ...]] = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, None)


def mask_audio(samples: Tensor, rng: random.Random, *, longest: int = 6400, every: int = 16_000) -> Tensor:
    """Samples (n,) with one stretch of up to `longest` silenced for every started `every` samples."""
    return _masked(samples, rng, longest, every, 0.0)


def mask_video(frames: Tensor, rng: random.Random, *, longest: int = 10, every: int = 25) -> Tensor:
    """Frames (T, H, W) uint8 with one stretch of up to `longest` made mean gray for every started `every` frames."""
    return _masked(frames, rng, longest, every, MEAN_GRAY)


def _masked(rows: Tensor, rng: random.Random, longest: int, every: int, value: float) -> Tensor:
    rows = rows.clone()
    for _ in range(-(-len(rows) // every)):
        length = rng.randrange(longest)
        start = rng.randrange(max(1, len(rows) - length))
        rows[start : start + length] = value
    return rows


@dataclass(frozen=True, eq=False)
class Augmentation:
    """What happens to a training clip.

    Attributes:
        noises: recorded noise or babble, (n,) each at 16 kHz; none leaves the audio clean.
        rooms: impulse responses, (n,) each at 16 kHz.
        snrs: levels, of which one is chosen at random; None is clean.
        room_share: share of clips that get the reverberation of a room.
    """

    noises: Sequence[Tensor] = ()
    rooms: Sequence[Tensor] = ()
    snrs: Sequence[float | None] = field(default=TRAINING_SNRS)
    room_share: float = 0.2

    @classmethod
    def from_folders(cls, folders: Sequence[str | Path], snrs: Sequence[float | None] = TRAINING_SNRS) -> Augmentation:
        """Noise from all sound files of some folders; those named `rir*` are impulse responses.

        Raises:
            FileNotFoundError: a folder has no sound file.
        """
        noises: list[Tensor] = []
        rooms: list[Tensor] = []
        for folder in map(Path, folders):
            files = sorted(path for end in ("flac", "wav") for path in folder.glob(f"*.{end}"))
            if not files:
                raise FileNotFoundError(f"no sound files (*.flac, *.wav) in {folder}")
            for path in files:
                (rooms if path.name.startswith("rir") else noises).append(read_audio(path))
        return cls(noises, rooms, snrs)

    def noise(self, samples: int, rng: random.Random) -> Tensor:
        """A random stretch of one noise, of at most so many samples."""
        source = rng.choice(self.noises)
        start = rng.randrange(max(1, len(source) - samples))
        return source[start : start + samples]

    def noisy(self, speech: Tensor, rng: random.Random) -> Tensor:
        """Room and noise, each by chance; no mask."""
        if self.rooms and rng.random() < self.room_share:
            audio = extras.require("torchaudio.functional")
            room = rng.choice(self.rooms)
            direct = int(room.abs().argmax())  # the sound stays where it is in time, and with it the lips
            speech = audio.fftconvolve(speech, room / room.norm())[direct : direct + len(speech)]
        snr = rng.choice(self.snrs)
        return mix(speech, self.noise(len(speech), rng), snr) if self.noises and snr is not None else speech

    def audio(self, speech: Tensor, rng: random.Random) -> Tensor:
        """A training recording (n,): room, noise, mask."""
        return mask_audio(self.noisy(speech, rng), rng)

    def video(self, frames: Tensor, rng: random.Random, crop: int = 88) -> Tensor:
        """Training frames (T, H, W) to (T, crop, crop): the same crop anywhere in all frames, mask."""
        top, left = (rng.randrange(side - crop + 1) for side in frames.shape[1:])
        return mask_video(frames[:, top : top + crop, left : left + crop], rng)
