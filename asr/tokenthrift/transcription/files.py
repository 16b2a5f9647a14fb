"""Speech models on files, for `tokenthrift plan`: the tokens of a recording or a talking video, from its header.

A recording longer than a window is counted as windows of the greatest length and a rest. The batch job cuts at pauses
and leaves silence out, so that what it computes is no more than that but for one token a window.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from tokenthrift.budget import ItemSize, TokenBudget, TokenUsage
from tokenthrift.media.probe import probe
from tokenthrift.media.suffixes import MEDIA_SUFFIXES
from tokenthrift.tokenize import NotRead

__all__ = ["SpeechFiles", "windows_of"]

FRAMES_PER_SECOND = 25  # of every model that reads lips


class SpeechFiles:
    """A `FilePlanner` of recordings and talking videos.

    Args:
        model: of a system that transcribes.
        options: of the command; there are none of its own.
    """

    noun = "recording"
    suffixes = MEDIA_SUFFIXES

    def __init__(self, model: Any, options: argparse.Namespace) -> None:
        self.model = model

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """There are none."""

    def plan(self, path: Path, budget: TokenBudget) -> TokenUsage:
        """See `FilePlanner.plan`: the sum over the windows, each under the budget."""
        cost = self.model.native_cost
        found = probe(path)
        if found.kind == "image":
            raise NotRead("a picture; the model reads recordings")
        seconds = found.size.seconds if cost.per_second is not None and found.kind != "video" else None
        frames = round(found.video.seconds * FRAMES_PER_SECOND) if cost.per_frame is not None and found.video else None
        size = ItemSize(seconds=seconds, frames=None if frames is None else max(1, frames))
        if not size.known:
            reads = "sound" if cost.per_frame is None else "pictures"
            raise NotRead(f"it has no {reads}, and the model reads nothing else")
        usage = self.model.plan(windows_of(size, self.model.max_seconds), budget)
        native, cap, used = (sum(getattr(each, name) for each in usage) for name in ("native", "cap", "used"))
        return TokenUsage(native=native, cap=cap, used=used)


def windows_of(size: ItemSize, longest: float) -> list[ItemSize]:
    """A recording as windows of equal pictures and sound, the last one the rest.

    Args:
        size: seconds of sound and frames of pictures at 25 a second, or one of them.
        longest: seconds of a window.
    """
    length = max(size.seconds or 0.0, (size.frames or 0) / FRAMES_PER_SECOND)
    sizes = []
    for i in range(max(1, math.ceil(length / longest))):
        start, stop = i * longest, (i + 1) * longest
        seconds = None if size.seconds is None else max(0.0, min(size.seconds, stop) - start)
        first, last = round(start * FRAMES_PER_SECOND), round(stop * FRAMES_PER_SECOND)
        frames = None if size.frames is None else max(0, min(size.frames, last) - first)
        sizes.append(ItemSize(seconds=seconds or None, frames=frames or None))
    return sizes
