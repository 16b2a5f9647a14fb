"""Recordings beside the pictures and clips of `tiny_vlms`, and what the processors of the families make of them.

Pixels and spectrograms depend on the seed of an item alone. Each function of rows gives the arguments that hold the
media of these rows; each function of an item says how many tokens it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.multimodal.tiny_vlms import IMAGE, SIZE, VIDEO, Clip, Picture, noise

AUDIO, AUDIO_START, AUDIO_END = 5, 6, 7
MELS = 64


@dataclass(frozen=True)
class Recording:
    """A spectrogram of `frames` frames, at most MELS."""

    seed: int
    frames: int = MELS


Media = Picture | Clip | Recording
Row = Sequence[int | Media]
Inputs = dict[str, Any]


def parts(rows: Sequence[Row], kind: type) -> list[Any]:
    return [part for row in rows for part in row if isinstance(part, kind)]


def square(rows: Sequence[Row], ids: Tensor) -> Inputs:
    return {"pixel_values": torch.stack([noise(p.seed, 3, SIZE, SIZE) for p in parts(rows, Picture)])}


def clips(rows: Sequence[Row]) -> Inputs:
    values = parts(rows, Clip)
    return (
        {"pixel_values_videos": torch.stack([noise(c.seed, c.frames, 3, SIZE, SIZE) for c in values])} if values else {}
    )


def tiles(rows: Sequence[Row], ids: Tensor) -> Inputs:
    """A picture twice as wide is two tiles."""
    values = [noise(p.seed, p.width // SIZE, 3, SIZE, SIZE) for p in parts(rows, Picture)]
    return {"pixel_values": torch.cat(values)}


def padded_tiles(rows: Sequence[Row], ids: Tensor) -> Inputs:
    values = [[noise(p.seed, 3, SIZE, SIZE) for p in parts([row], Picture)] for row in rows]
    pixels = torch.zeros(len(rows), max(map(len, values)), 3, SIZE, SIZE)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            pixels[i, j] = value
    return {"pixel_values": pixels}


def anyres(rows: Sequence[Row], ids: Tensor) -> Inputs:
    pictures = parts(rows, Picture)
    if not pictures:
        return clips(rows)
    values = torch.zeros(len(pictures), 3, 3, SIZE, SIZE)
    for i, p in enumerate(pictures):
        n = 1 + p.height * p.width // SIZE**2
        values[i, :n] = noise(p.seed, n, 3, SIZE, SIZE)
    sizes = torch.tensor([[p.height, p.width] for p in pictures])
    return {"pixel_values": values, "image_sizes": sizes, **clips(rows)}


def pixtral(rows: Sequence[Row], ids: Tensor) -> Inputs:
    pictures = parts(rows, Picture)
    pixels = torch.zeros(len(pictures), 3, max(p.height for p in pictures), max(p.width for p in pictures))
    for i, p in enumerate(pictures):
        pixels[i, :, : p.height, : p.width] = noise(p.seed, 3, p.height, p.width)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[p.height, p.width] for p in pictures])}


def gemma(rows: Sequence[Row], ids: Tensor) -> Inputs:
    return {**square(rows, ids), "token_type_ids": (ids == IMAGE).long()}


def paligemma(rows: Sequence[Row], ids: Tensor) -> Inputs:
    return {**square(rows, ids), "token_type_ids": torch.zeros_like(ids)}


def video_llava(rows: Sequence[Row], ids: Tensor) -> Inputs:
    pictures = {"pixel_values_images": square(rows, ids)["pixel_values"]} if parts(rows, Picture) else {}
    return {**pictures, **clips(rows)}


def grid_of(item: Picture | Clip) -> tuple[int, int, int]:
    """Patches of 4 pixels and 2 frames."""
    return (1, item.height // 4, item.width // 4) if isinstance(item, Picture) else (item.frames // 2, 4, 4)


def qwen(rows: Sequence[Row], ids: Tensor) -> Inputs:
    given: Inputs = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    for name, kind, pixels in (("image", Picture, "pixel_values"), ("video", Clip, "pixel_values_videos")):
        if items := parts(rows, kind):
            grids = [grid_of(item) for item in items]
            values = [noise(item.seed, t * h * w, 96) for item, (t, h, w) in zip(items, grids, strict=True)]
            given |= {pixels: torch.cat(values), f"{name}_grid_thw": torch.tensor(grids)}
    return given


def kimi(rows: Sequence[Row], ids: Tensor) -> Inputs:
    pictures = parts(rows, Picture)
    grids = [grid_of(p) for p in pictures]
    values = [noise(p.seed, h * w, 3, 4, 4) for p, (_, h, w) in zip(pictures, grids, strict=True)]
    return {"pixel_values": torch.cat(values), "image_grid_thw": torch.tensor(grids)}


def mels(rows: Sequence[Row], bins: int = 8, mask: str = "", last: bool = True) -> Inputs:
    recordings = parts(rows, Recording)
    if not recordings:
        return {}
    values = torch.zeros(len(recordings), bins, MELS)
    real = torch.zeros(len(recordings), MELS, dtype=torch.long)
    for i, r in enumerate(recordings):
        values[i, :, : r.frames] = noise(r.seed, bins, r.frames)
        real[i, : r.frames] = 1
    given = {"input_features": values if last else values.transpose(1, 2)}
    return given | ({mask: real} if mask else {})


def omni(rows: Sequence[Row], ids: Tensor) -> Inputs:
    given = qwen(rows, ids)
    del given["mm_token_type_ids"]
    if count := len(parts(rows, Clip)):
        given["video_second_per_grid"] = torch.ones(count)
    return given | mels(rows, mask="feature_attention_mask")


def granite(rows: Sequence[Row], ids: Tensor) -> Inputs:
    given = mels(rows, last=False)
    counts = [granite_count(r) for r in parts(rows, Recording)]
    return given | {"input_features_mask": torch.arange(MELS // 8 * 4) < torch.tensor(counts)[:, None]}


def granite_count(item: Recording) -> int:
    return -(-item.frames // 8) * 4


def merged(item: Picture | Clip) -> int:
    frames, height, width = grid_of(item)
    return frames * height * width // 4


def packed(item: Picture | Clip) -> int:
    """An overview of 16 tokens, and tiles whose rows end with a newline; a clip is pooled to 4 tokens a frame."""
    if isinstance(item, Clip):
        return item.frames * 4
    return 16 + item.height // 4 * (item.width // 4 + 1)


def whisper_like(item: Recording) -> int:
    return ((item.frames - 1) // 2 + 1 - 2) // 2 + 1
