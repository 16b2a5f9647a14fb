"""One file through one model under one budget, as the demo page shows it: tokens before and after, and the result.

Which file belongs to which kind of model follows from the file's content, as everywhere in this package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tokenthrift.budget import DecodeBudget, ItemSize, TokenBudget, TokenUsage
from tokenthrift.media.audio import read_audio
from tokenthrift.media.image import read_image, square
from tokenthrift.media.kinds import kind_of
from tokenthrift.media.video import read_frames
from tokenthrift.models import load

__all__ = ["Shown", "models_for", "respond", "show"]

loaded = cache(load)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows.

    Attributes:
        planned: tokens before anything ran.
        used: tokens after it.
        text: what was written, or said about the picture.
        picture: a PNG, if there is one.
    """

    planned: TokenUsage
    used: TokenUsage
    text: str
    picture: str | None = None


def respond(
    path: str | None, model: str | None, percent: float, rounds: float, models: Sequence[str]
) -> tuple[str, str, str | None]:
    """What the page says and shows of a file; of one that cannot be read, why.

    Args:
        path: what was dropped.
        model: the chosen one; another is taken where it does not read such files.
        percent: of the native tokens, from 1 to 100.
        rounds: see `show`.
        models: to choose from.

    Returns:
        A line about tokens or about what is wrong, the text, and a PNG or None.
    """
    if not path:
        return "Drop a picture, a clip or a recording.", "", None
    name = Path(path).name
    try:
        able = models_for(path, models)
        if not able:
            return f"{name} is no picture, clip or recording that these models read.", "", None
        chosen = model if model in able else able[0]
        shown = show(chosen, path, percent / 100, int(rounds))
    except (ValueError, OSError) as error:
        return f"{name}: {getattr(error, 'reason', None) or str(error).replace(path, name)}", "", None
    planned = f"{chosen}: at most {shown.planned.used} of {shown.planned.native} tokens, known before it ran"
    used = f"{shown.used.used} used" + (f" in {shown.used.rounds} rounds" if shown.used.rounds else "")
    return f"{planned}; {used}", shown.text, shown.picture


def show(model: str, path: str, share: float, rounds: int) -> Shown:
    """Runs a file through a model.

    Args:
        model: a folder or `owner/name`.
        path: a picture, a clip or a recording.
        share: of the native tokens, in (0, 1]; 1 for no ceiling.
        rounds: at most, for models that decode in rounds; 0 for the way and the limit of the model's own settings.

    Raises:
        ValueError: the model reads other files, the file cannot be read, or the budget cannot be honored.
    """
    own: Any = loaded(model)
    budget = TokenBudget(retention=share) if share < 1 else None
    if hasattr(own, "transcribe"):
        return _speech(own, path, budget, rounds)
    if own.system == "karl":
        return _picture(own, path, budget)
    if own.system == "vqtoken_answerer":
        return _clip(own, path, budget)
    raise ValueError(f"{model} is of the system {own.system}, which the page does not show")


def _speech(model: Any, path: str, budget: TokenBudget | None, rounds: int) -> Shown:
    audio = read_audio(path)[: round(model.max_seconds * model.sample_rate)]
    if not model.support.fields & {"retention"}:
        budget = None  # the rate is fixed; the rounds are what adapts
    (planned,) = model.plan([ItemSize(seconds=len(audio) / model.sample_rate)], budget)
    (result,) = model.transcribe([audio], budget=budget, decode=DecodeBudget(max_rounds=rounds or None))
    return Shown(planned, result.usage, result.text or "(nothing was said)")


def _picture(model: Any, path: str, budget: TokenBudget | None) -> Shown:
    height, width = model.config.size
    side = max(height, width)
    images = square(read_image(path), side)[None, :, (side - height) // 2 :, (side - width) // 2 :]
    images = images[..., :height, :width]
    (planned,) = model.plan([ItemSize(height=height, width=width)], budget)
    tokens = model.encode(images, budget)
    again = model.decode(tokens)
    error = float((again - images).abs().mean())
    both = torch.cat([images[0], again[0]], 2).clamp(0, 1)
    return Shown(planned, tokens.usage[0], f"pixel error {error:.3f} (left the picture, right its tokens)", _png(both))


def _clip(model: Any, path: str, budget: TokenBudget | None) -> Shown:
    from tokenthrift.registry import resolve

    size = model.config.image_size
    frames = read_frames(path, count=model.config.num_frames, size=(size, size))
    native = model.encode(frames.pixels[None].float() / 255)
    (planned,) = model.vqtoken.plan(native.item_sizes(), budget)
    coded = model.vqtoken.compress(native, budget)
    draw = resolve("tokenthrift.vqtoken.evaluation.visualize:draw_clip")
    out = Path(tempfile.mkdtemp()) / "codes.png"
    used = coded.tokens.usage[0]
    draw(out, Path(path).name, frames.pixels, frames.seconds, {f"{used.used} of {used.native} tokens": coded.maps[0]})
    return Shown(planned, used, "each color is a code", str(out))


def _png(image: torch.Tensor) -> str:
    from tokenthrift.extras import require

    pixels = (image * 255).round().byte().permute(1, 2, 0).repeat_interleave(4, 0).repeat_interleave(4, 1)
    path = Path(tempfile.mkdtemp()) / "picture.png"
    require("PIL.Image").fromarray(pixels.numpy()).save(path)
    return str(path)


def models_for(path: str, models: Sequence[str]) -> list[str]:
    """Those of `models` that read a file, by what the file holds."""
    speech, kind = {"dllm_asr", "mtsk"}, kind_of(Path(path))
    wanted = {"picture": {"karl"}, "sound": speech, "film": {"vqtoken_answerer", *speech}, "animation": {"karl"}}
    return [model for model in models if loaded(model).system in wanted.get(kind or "", set())]
