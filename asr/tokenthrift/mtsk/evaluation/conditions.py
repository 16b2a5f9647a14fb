"""The conditions of an evaluation: babble at a level, and controls that make one stream useless.

Source: the noise conditions of Llama-MTSK (arXiv 2503.06362). What differs: 0 dB is 0 dB and counts where there is
speech, every model gets the same noise, and shuffled, still and muted streams show how much the lips contribute.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenthrift.mtsk.audiovisual.noise import mix
from tokenthrift.mtsk.training.clips import Clip

__all__ = ["CONTROLS", "conditions", "noisy", "degraded", "unpunctuated"]

CONTROLS = ("shuffled video", "still video", "muted audio")


def conditions(snrs: Sequence[float | None], controls: bool) -> list[tuple[float | None, str]]:
    """(level, control) of every pass over a set.

    Controls are at 0 dB, at the loudest babble where 0 dB is not among the levels, and clean where there is no babble;
    muted audio is clean.
    """
    plain: list[tuple[float | None, str]] = [(snr, "") for snr in snrs]
    if not controls:
        return plain
    levels = [snr for snr in snrs if snr is not None]
    level = 0.0 if 0.0 in levels else min(levels, default=None)
    return plain + [(None if control == "muted audio" else level, control) for control in CONTROLS]


def degraded(clips: Sequence[Clip], control: str) -> list[Clip]:
    """The clips with one stream made useless, or as they are where there is no control.

    Args:
        clips: with both streams.
        control: `shuffled video` gives every clip the lips of one of like length that says something else, cut or its
            last frame repeated to the clip's own length; `still video` repeats its first frame; `muted audio` leaves
            silence.

    Raises:
        ValueError: all clips have one text, so that there is no shuffle.
    """
    if control == "shuffled video":
        return _shuffled(clips)
    out = []
    for clip in clips:
        audio, video = clip.audio, clip.video
        if control == "still video" and video is not None:
            video = video[:1].expand_as(video)
        if control == "muted audio" and audio is not None:
            audio = torch.zeros_like(audio)
        out.append(replace(clip, audio=audio, video=video))
    return out


def noisy(clips: Sequence[Clip], babble: Tensor, snr: float | None, seed: int) -> list[Clip]:
    """The clips with babble at a level; the noise of a clip depends on its place and the seed alone."""
    if snr is None:
        return list(clips)
    out = []
    for i, clip in enumerate(clips):
        audio = clip.audio
        if audio is not None:
            start = random.Random(f"{seed}-{i}").randrange(max(1, len(babble) - len(audio)))
            audio = mix(audio, babble[start : start + len(audio)], snr)
        out.append(replace(clip, audio=audio))
    return out


def unpunctuated(text: str) -> str:
    """Lower case, as published, and without punctuation, of which the published texts have none; apostrophes stay."""
    return " ".join(re.sub(r"[^\w' ]+", " ", text.lower()).split())


def _shuffled(clips: Sequence[Clip]) -> list[Clip]:
    texts = [unpunctuated(clip.text) for clip in clips]
    if len(set(texts)) < 2:
        raise ValueError(
            f"shuffled video needs clips of two texts or more; there are {len(clips)} of {len(set(texts))}"
        )
    lengths = [0 if clip.video is None else len(clip.video) for clip in clips]
    order = sorted(range(len(clips)), key=lambda i: (lengths[i], i))
    out = list(clips)
    for place, i in enumerate(order):
        # The longer neighbor before the shorter, so that lips come up about equally often.
        steps = (step for n in range(1, len(order)) for step in (n, -n))
        others = (order[place + step] for step in steps if 0 <= place + step < len(order))
        other = next(j for j in others if texts[j] != texts[i])
        out[i] = replace(clips[i], video=_fitted(clips[other].video, lengths[i]))
    return out


def _fitted(video: Tensor | None, frames: int) -> Tensor | None:
    """Lips (T, H, W) at another length."""
    if video is None:
        return None
    return video[torch.arange(frames).clamp(max=len(video) - 1)]
