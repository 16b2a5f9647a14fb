"""Where to cut a long recording: windows of at most 30 s that hold all its speech, divided where nobody speaks.

Where there is speech is said by Silero VAD (`vad`), if its package is installed; else by energy alone, as follows. The
level of a frame of 20 ms is its power from 200 to 4,000 Hz in decibels of full scale, so that neither an offset nor
mains hum hides a quiet voice. The noise floor of a recording is the 10th percentile of its levels. It holds sound where
three frames in a row (a click is shorter) lie 6 dB above that floor, however quiet it is on the whole; what lies below
-85 dB is silence in any recording. So steady noise or a steady tone is silence, and noise that rises on the way is
sound. A recording under a second is too short to show its floor: all above -85 dB in it is sound.

Stretches of speech closer than `PAUSE_SECONDS` form one window with 0.3 s around them. A longer one is cut in its
second half, at the quietest frame of a pause: a fifth of a second or more without speech, which is longer than a stop
consonant. Where nobody pauses it is cut at the quietest frame, which may lie in a word, and the next window begins
`OVERLAP_SECONDS` earlier, so that `joining` can take every word from the window that holds it whole. Nothing that is
speech lies between windows, and no model runs there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FRAME_SECONDS",
    "OVERLAP_SECONDS",
    "PAUSE_SECONDS",
    "Levels",
    "Window",
    "cut",
    "frame_levels",
    "plan_windows",
    "sounding",
]

Levels: TypeAlias = NDArray[np.float64]
Samples: TypeAlias = NDArray[np.float32]

FRAME_SECONDS: Final = 0.02
PAUSE_SECONDS: Final = 1.0
OVERLAP_SECONDS: Final = 3.0
SHORT_PAUSE_SECONDS: Final = 0.2
MARGIN_SECONDS: Final = 0.3
BAND_HERTZ: Final = (200, 4000)
SILENCE_DB: Final = -85.0
ABOVE_FLOOR_DB: Final = 6.0
SHORT_SECONDS: Final = 1.0
_SUSTAINED: Final = 3
_FLOOR_PERCENTILE: Final = 10
_SMOOTH: Final = 5


@dataclass(frozen=True, slots=True)
class Window:
    """Samples `start` up to `stop` of a recording."""

    start: int
    stop: int


def frame_levels(blocks: Iterable[Samples], sample_rate: int) -> tuple[Levels, int]:
    """Level of every frame, from a stream.

    Args:
        blocks: (samples,) pieces of a recording, in order.
        sample_rate: Samples per second.

    Returns:
        (frames,) levels in decibels of full scale (a last frame may be shorter), and the number of samples.
    """
    size = _frame_size(sample_rate)
    levels: list[Levels] = []
    rest = np.zeros(0, dtype=np.float32)
    total = 0
    for block in blocks:
        total += len(block)
        rest = np.concatenate([rest, block])
        whole = len(rest) // size * size
        levels.append(_level(rest[:whole].reshape(-1, size), sample_rate))
        rest = rest[whole:]
    if len(rest):
        levels.append(_level(np.pad(rest, (0, size - len(rest)))[None], sample_rate))
    return np.concatenate([np.zeros(0), *levels]), total


def plan_windows(
    levels: Levels,
    total: int,
    sample_rate: int,
    max_seconds: float = 30.0,
    speech: NDArray[np.bool_] | None = None,
) -> list[Window]:
    """Divides a recording.

    Args:
        levels: (frames,) from `frame_levels`.
        total: Samples of the recording.
        sample_rate: Samples per second.
        max_seconds: Longest window; at least a few frames.
        speech: (frames,) whether somebody speaks; by the levels if not given.

    Returns:
        Windows in order of their start and of their end, none empty or longer than `max_seconds`; every frame that
        holds speech lies in one of them. Two that follow each other overlap where the cut between them is in no pause.
        No window for a silent recording.
    """
    size = _frame_size(sample_rate)
    longest = int(max_seconds * sample_rate) // size
    if longest < 2:
        raise ValueError(f"windows of {max_seconds} s are too short; the least is {2 * FRAME_SECONDS} s")
    smooth = np.convolve(np.pad(levels, _SMOOTH // 2, mode="edge"), np.full(_SMOOTH, 1 / _SMOOTH), mode="valid")
    spoken = sounding(levels) if speech is None else speech
    paused = _runs_of(~spoken, round(SHORT_PAUSE_SECONDS / FRAME_SECONDS))
    overlap = min(round(OVERLAP_SECONDS / FRAME_SECONDS), longest // 4)
    windows = []
    for start, stop in _stretches(spoken):
        while stop - start > longest:
            half = start + longest // 2 + 1
            candidates = smooth[half : start + longest + 1].copy()
            pauses = np.append(paused, True)[half : start + longest + 1]
            if pauses.any():
                candidates[~pauses] = np.inf
            # The last of equally quiet frames, so that a stretch without any pause is not cut more often than it must.
            edge = start + longest - int(np.argmin(candidates[::-1]))
            windows.append((start, edge))
            start = edge if pauses.any() else edge - overlap
        windows.append((start, stop))
    return [Window(start * size, min(stop * size, total)) for start, stop in windows]


def cut(blocks: Iterable[Samples], windows: Sequence[Window]) -> Iterator[Samples]:
    """Cuts windows out of a stream; keeps no more than one window and one block in memory.

    Args:
        blocks: (samples,) pieces of a recording, in order.
        windows: Windows in order of their start and of their end.

    Yields:
        (samples,) of every window.
    """
    waiting = deque(windows)
    parts: deque[tuple[int, Samples]] = deque()
    position = 0
    for block in blocks:
        parts.append((position, block))
        position += len(block)
        while waiting and waiting[0].stop <= position:
            window = waiting.popleft()
            yield np.concatenate([part[max(0, window.start - at) : max(0, window.stop - at)] for at, part in parts])
        if not waiting:
            return
        while parts and parts[0][0] + len(parts[0][1]) <= waiting[0].start:
            parts.popleft()


def _frame_size(sample_rate: int) -> int:
    return max(1, round(FRAME_SECONDS * sample_rate))


def _level(frames: Samples, sample_rate: int) -> Levels:
    """(frames,) decibels from (frames, samples); a full-scale sine inside the band has -3."""
    size = frames.shape[1]
    # The window keeps hum, which is far louder than a quiet voice, from leaking into the band.
    window = np.hanning(size + 2)[1:-1]
    low, high = (round(hertz * size / sample_rate) for hertz in BAND_HERTZ)
    spectrum = np.fft.rfft(frames * window, axis=1)[:, low : high + 1]
    power = 2 * (np.abs(spectrum) ** 2).sum(axis=1) / (size * (window**2).sum())
    return np.asarray(10 * np.log10(np.maximum(power, 1e-12)))


def sounding(levels: Levels) -> NDArray[np.bool_]:
    """Where energy finds sound: runs of at least `_SUSTAINED` frames that stand out from the recording's own floor."""
    if not len(levels):
        return np.zeros(0, dtype=bool)
    threshold, run = SILENCE_DB, _SUSTAINED
    if len(levels) * FRAME_SECONDS < SHORT_SECONDS:
        run = min(run, len(levels))
    else:
        threshold = max(threshold, float(np.percentile(levels, _FLOOR_PERCENTILE)) + ABOVE_FLOOR_DB)
    return _runs_of(levels > threshold, run)


def _runs_of(frames: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Those of the frames that stand in a row of at least so many."""
    if len(frames) < least:
        return np.zeros(len(frames), dtype=bool)
    whole = np.convolve(frames, np.ones(least), mode="valid") == least
    return np.asarray(np.convolve(whole, np.ones(least)) > 0)


def _stretches(sounding: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of sound with their margin, joined over pauses; a margin never reaches half way into a pause."""
    frames = np.flatnonzero(sounding)
    if not len(frames):
        return []
    pause, margin = round(PAUSE_SECONDS / FRAME_SECONDS), round(MARGIN_SECONDS / FRAME_SECONDS)
    breaks = np.flatnonzero(np.diff(frames) > pause)
    firsts, lasts = frames[np.r_[0, breaks + 1]], frames[np.r_[breaks, len(frames) - 1]]
    return [
        (max(0, int(first) - margin), min(len(sounding), int(last) + 1 + margin))
        for first, last in zip(firsts, lasts, strict=True)
    ]
