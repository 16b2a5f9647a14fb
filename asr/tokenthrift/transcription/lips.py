"""Lips beside the sound: what a file gives a recognizer that reads both, and what happens where one is missing.

A file with pictures and no face, or whose pictures end early, is transcribed from its sound alone if the model can do
that, and is an error with that reason if it cannot. A file without an audio track, or with a silent one, is lip-read
from end to end, if the model can; without that a silent file has no text and one without audio is an error. Recognizers
of sound alone never read pictures.

The lips of a file are found before its first window is cut and held until its last: 96 x 96 bytes a frame, 14 MB for a
minute, 830 MB for an hour. A window that waits for its batch holds its own frames alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenthrift.budget import BudgetLike, ItemSize, TokenBudget
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer
from tokenthrift.transcription.windows import Samples, Window

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Streams", "lips_in", "lips_windows", "streams_of"]


class Streams(NamedTuple):
    """A window of a recording: (samples,) of sound, (T, H, W) of lips, or one of them."""

    audio: Samples | None
    video: Tensor | None


def lips_in(model: Recognizer | AudioVisualRecognizer, path: Path) -> Tensor | None:
    """The lips in a file, or None where there are none or the model does not look.

    Raises:
        ValueError: no face is found, and the model cannot do without.
    """
    if not isinstance(model, AudioVisualRecognizer):
        return None
    try:
        return model.read_lips(path)
    except ValueError:
        if model.accepts(audio=True, video=False):
            return None
        raise


def lips_windows(frames: int, frame_rate: int, sample_rate: int, max_seconds: float) -> list[Window]:
    """Equal windows over a video, none longer than `max_seconds`, in samples."""
    count = -(-frames // int(max_seconds * frame_rate))
    edges = [round(frames * i / count) * sample_rate // frame_rate for i in range(count + 1)] if frames else [0]
    return [Window(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def streams_of(
    model: Recognizer | AudioVisualRecognizer,
    audio: Samples | None,
    lips: Tensor | None,
    window: Window,
    budget: BudgetLike,
) -> Streams:
    """What a window gives the model.

    Args:
        model: any.
        audio: the sound of the window.
        lips: of the whole file.
        window: in samples.
        budget: ceilings in tokens for the window.

    Raises:
        BudgetError: the window cannot be had for that.
        ValueError: a stream is missing that the model cannot do without.
    """
    seconds = None if audio is None else len(audio) / model.sample_rate
    if not isinstance(model, AudioVisualRecognizer):
        if TokenBudget.parse(budget) != TokenBudget():
            model.plan([ItemSize(seconds=seconds)], budget)
        return Streams(audio, None)
    if lips is not None:
        first, last = (round(edge * model.frame_rate / model.sample_rate) for edge in (window.start, window.stop))
        lips = lips[first:last].clone()  # a view would keep the whole file's in memory
    video = lips if lips is not None and len(lips) else None
    if not model.accepts(audio=audio is not None, video=video is not None):
        missing = "no lips" if video is None else "no sound"
        second = window.start / model.sample_rate
        raise ValueError(f"the model was not trained for this: {missing} in the file from {second:.1f} s on")
    model.plan([ItemSize(seconds=seconds, frames=None if video is None else len(video))], budget)
    return Streams(audio, video)
