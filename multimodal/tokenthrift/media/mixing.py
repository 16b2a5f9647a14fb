"""Several channels to one, without one canceling the other.

The usual average of two channels is silence where one is the other turned upside down (a cable soldered wrong, a
"vocal remover", some phones). Each stretch of four seconds is averaged unless that loses most of its power; there the
louder channel is taken, and stays taken until another is clearly louder. A change fades over five milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenthrift.media.audio_track import AudioError, Samples

__all__ = ["Channels", "Mixer", "channel_name"]

Channels: TypeAlias = Literal["mix", "left", "right"] | int

_STRETCH_SECONDS: Final = 4
_FADE_SECONDS: Final = 0.005
# Unrelated channels keep 1 / n of their power when averaged; half of that is a correlation of -0.5 between two.
_CANCELED: Final = 0.5
_CLEARLY_LOUDER: Final = 4.0


def channel_name(number: int, count: int) -> str:
    """What a channel, counted from 1, is called among so many."""
    return ("left", "right")[number - 1] if count == 2 else str(number)


class Mixer:
    """Brings the channels of one file to one; `chosen` is whether it had to choose one of them.

    Args:
        path: the file, for errors.
        channels: what is wanted of them.
    """

    def __init__(self, path: Path, channels: Channels) -> None:
        self._path, self._channels = path, channels
        if not (channels in ("mix", "left", "right") or (isinstance(channels, int) and channels >= 1)):
            raise ValueError(f"channels are mix, left, right or a number from 1, not {channels!r}")
        self._weights: NDArray[np.float32] | None = None
        self._taken: set[str] = set()

    @property
    def chosen(self) -> bool:
        """Whether the channels canceled each other somewhere."""
        return bool(self._taken)

    @property
    def remark(self) -> str:
        """What was chosen, for a person."""
        return f"its channels cancel each other; the {' and the '.join(sorted(self._taken))} one was read there"

    def mix(self, rate: int, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """One channel from (samples, channels) blocks, all with the same number of channels."""
        self._weights = None
        for stretch in _cut(blocks, _STRETCH_SECONDS * rate):
            count = stretch.shape[1]
            if count == 1 and self._channels in ("mix", "left", 1):
                yield stretch[:, 0]
            elif self._channels == "mix":
                yield self._mixed(stretch, rate)
            else:
                number = {"left": 1, "right": 2}.get(str(self._channels), self._channels)
                if not isinstance(number, int) or number > count:
                    raise AudioError(self._path, f"no channel {self._channels}: it has {count}")
                yield stretch[:, number - 1]

    def _mixed(self, stretch: Samples, rate: int) -> Samples:
        count = stretch.shape[1]
        mean = stretch.mean(axis=1, dtype=np.float32)
        powers = np.square(stretch, dtype=np.float64).mean(axis=0)
        weights = np.full(count, 1 / count, dtype=np.float32)
        if np.square(mean, dtype=np.float64).mean() < _CANCELED / count * powers.mean():
            loudest = int(powers.argmax())
            before = None if self._weights is None or self._weights.max() < 1 else int(self._weights.argmax())
            if before is not None and powers[loudest] < _CLEARLY_LOUDER * powers[before]:
                loudest = before
            weights = np.eye(count, dtype=np.float32)[loudest]
            self._taken.add(channel_name(loudest + 1, count))
            mixed = stretch[:, loudest].copy()
        else:
            mixed = mean
        if self._weights is not None and not np.array_equal(weights, self._weights):
            fade = min(len(stretch), max(1, round(_FADE_SECONDS * rate)))
            share = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
            mixed[:fade] = share * mixed[:fade] + (1 - share) * (stretch[:fade] @ self._weights)
        self._weights = weights
        return mixed


def _cut(blocks: Iterable[Samples], size: int) -> Iterator[Samples]:
    """The same samples in stretches of one size, so that nothing depends on how a decoder cuts them."""
    waiting: list[Samples] = []
    held = 0
    for block in blocks:
        while len(block):
            part, block = block[: size - held], block[size - held :]
            waiting.append(part)
            held += len(part)
            if held == size:
                yield np.concatenate(waiting)
                waiting, held = [], 0
    if waiting:
        yield np.concatenate(waiting)
