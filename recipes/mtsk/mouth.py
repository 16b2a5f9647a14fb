"""A mouth, drawn: `(frames, size, size)` grey pictures from mouth parameters and a face.

Filled curves with soft edges: skin with a gradient of light, a nose's shadow, chin, lips, cavity, teeth and tongue. A
face is drawn from a seed (`face_of`), what differs from clip to clip (where the crop lies, head motion, light, camera
noise, blur) from another (`draw`). Synthetic, and looks it; it shows what the viseme map says and no more. It is drawn
at half the size and enlarged, which takes a quarter of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 96


@dataclass(frozen=True, slots=True)
class Face:
    """What stays of a speaker: lengths in pixels of a 96-pixel crop, greys in 0 to 1."""

    skin: float
    lip: float
    tooth: float
    width: float
    upper: float
    lower: float
    bow: float
    gape: float
    lead: float
    moustache: float
    beard: float
    light: float
    crooked: float


def face_of(seed: int) -> Face:
    """The face of a speaker."""
    r = np.random.default_rng([seed, 77])
    skin = r.uniform(0.35, 0.8)
    return Face(
        skin=skin,
        lip=skin - r.uniform(0.08, 0.22),
        tooth=min(0.97, skin + r.uniform(0.1, 0.35)),
        width=r.uniform(36, 46),
        upper=r.uniform(4.5, 8.0),
        lower=r.uniform(6.0, 10.0),
        bow=r.uniform(0.0, 0.35),
        gape=r.uniform(18, 26),
        lead=r.uniform(0.04, 0.08),
        moustache=r.uniform(0.05, 0.2) * (r.random() < 0.2),
        beard=r.uniform(0.03, 0.15) * (r.random() < 0.2),
        light=r.uniform(-0.15, 0.15),
        crooked=r.uniform(-0.04, 0.04),
    )


def _walk(r: np.random.Generator, frames: int, scale: float) -> np.ndarray:
    """A slow random motion about zero."""
    knots = r.normal(0, scale, 3 + frames // 12)
    return np.interp(np.arange(frames), np.arange(len(knots)) * 12, knots)


def _edge(distance: Tensor, softness: float = 0.8) -> Tensor:
    """1 inside (positive distance in pixels), 0 outside."""
    return torch.sigmoid(distance / softness)


def draw(track: np.ndarray, face: Face, seed: int, size: int = SIZE) -> Tensor:
    """`(frames, size, size)` uint8 pictures.

    Args:
        track: `(frames, 8)` of `visemes.mouth_track`.
        face: who speaks.
        seed: of this clip.
        size: side of the picture, even; a smaller one is a crop about the same center.
    """
    r = np.random.default_rng([seed, 78])
    frames = len(track)
    width, gap, rounded, lifted, tuck, teeth, tongue, jaw = (
        torch.from_numpy(column.astype(np.float32))[:, None, None] for column in track.T
    )
    zoom = r.uniform(0.9, 1.1)
    turn = face.crooked + r.normal(0, 0.03) + _walk(r, frames, 0.02)
    x0 = r.normal(0, 1.5) + _walk(r, frames, 0.8)
    y0 = r.normal(0, 1.5) + _walk(r, frames, 0.8) - 4
    row = 2 * (torch.arange(size // 2) - (size // 2 - 1) / 2).float()
    shift = [torch.from_numpy(v.astype(np.float32))[:, None, None] for v in (x0, y0, np.cos(turn), np.sin(turn))]
    dx, dy = row[None, None, :] - shift[0], row[None, :, None] - shift[1]
    x = (shift[2] * dx + shift[3] * dy) / zoom
    y = (shift[2] * dy - shift[3] * dx) / zoom

    half = face.width / 2 * (0.45 + 0.9 * width)
    u = (x / half).square().clamp_max(1.0)
    arc = (1 - u).sqrt()
    opening = face.gape * gap
    top = -0.42 * opening * arc - 1.5 * lifted * arc  # inner edge of the upper lip
    bottom = (0.58 * opening * (1 - tuck) - 1.0 * tuck) * arc
    upper = face.upper * (1 + 0.5 * rounded) * (1 - 0.15 * tuck)
    lower = face.lower * (1 + 0.45 * rounded) * (1 - 0.55 * tuck)
    bow = 1 - face.bow * torch.exp(-(x / 3.5).square())
    outer_top = top - upper * bow * (1 - u).clamp_min(1e-6).pow(0.7)
    outer_bottom = bottom + lower * (1 - u).clamp_min(1e-6).pow(0.6)

    picture = face.skin + face.light * x / 48 + r.normal(0, 0.03) - 0.0004 * (y + 10).square().clamp_max(900) / 6
    picture = picture - 0.10 * torch.exp(-((x / 9).square() + ((y + 36) / 7).square()))  # below the nose
    chin = 24 + 0.55 * face.gape * jaw
    picture = picture - 0.08 * torch.exp(-((x / 22).square() + ((y - chin) / 3.5).square()))
    if face.moustache:
        band = torch.exp(-(((y - outer_top.detach() + 6) / 4).square() + (x / 26).square().square()))
        picture = picture - face.moustache * band
    if face.beard:
        picture = picture - face.beard * torch.sigmoid((y - 6) / 4)
    inside = _edge(half - x.abs(), 1.2)
    lips = inside * _edge(y - outer_top) * _edge(outer_bottom - y)
    shade = (
        face.lip - 0.05 * torch.exp(-((y - top) / 2).square()) + 0.05 * torch.exp(-((y - bottom - 4) / 2.5).square())
    )
    picture = picture + lips * (shade - picture)
    cavity = inside * _edge(y - top, 0.5) * _edge(bottom - y, 0.5)
    flesh = 0.06 + 0.30 * tongue * _edge(y - (bottom - 1.5 - 0.5 * opening * tongue), 1.5) * _edge(
        half * 0.7 - x.abs(), 2
    )
    tooth = teeth * _edge(top + 2 + 0.28 * opening + 2.5 * tuck - y, 0.7) * _edge(half * 0.8 - x.abs(), 2)
    mouth = flesh + tooth * (face.tooth - flesh)
    picture = picture + cavity * (mouth - picture)
    # The tucked lower lip uncovers the upper teeth above it.
    bite = tuck * inside * _edge(half * 0.6 - x.abs(), 1.5) * torch.exp(-((y - top - 0.5) / 1.6).square())
    picture = picture + bite * (face.tooth - picture)
    # The line between closed lips.
    seam = inside * (1 - gap / 0.08).clamp_min(0) * torch.exp(-((y - 0.5 * (top + bottom)) / 0.9).square())
    picture = picture - 0.25 * seam * (1 - tuck)

    if r.random() < 0.2:
        picture = F.avg_pool2d(picture[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    picture = F.interpolate(picture[:, None], scale_factor=2, mode="bilinear")[:, 0]
    gain, offset = r.uniform(0.85, 1.15), r.normal(0, 0.04)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(int(r.integers(2**31))))
    picture = gain * picture + offset + r.uniform(0.005, 0.03) * noise
    return (255 * picture.clamp(0, 1)).to(torch.uint8)
