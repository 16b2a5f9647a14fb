"""What makes the native tokens of a clip: the encoder of a model at hand, or none at all.

VQToken clusters whatever an encoder says. Those here share one shape, so that the command and the evaluation on real
clips do not care which it is; each tells the grid of a clip before a frame is decoded.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer
from tokenthrift.vqtoken.token_hash import Grid
from tokenthrift.vqtoken.video_lm.chat import NEWLINES, VideoChat

__all__ = ["AnswererEncoder", "ChatEncoder", "ClipEncoder", "PixelPatches"]


class ClipEncoder(Protocol):
    """An encoder of clips.

    Attributes:
        name: for tables.
        size: height and width of the frames that it takes.
        after: tokens after those of the frames, such as a newline.
    """

    name: str
    size: tuple[int, int]
    after: int

    def frames(self, wanted: int, available: int) -> int:
        """How many frames it takes of a clip that has so many."""

    def grid(self, frames: int) -> Grid:
        """Frames, rows and columns of tokens."""

    def encode(self, frames: Tensor) -> Tensor:
        """(T, 3, height, width) uint8 to (N, D): the tokens of the grid in raster order, and those after them."""


class PixelPatches:
    """No encoder: a token is a patch of 16 pixels, as 4 x 4 mean colors. What every trained encoder should beat.

    One coordinate is the same for all, so that bright and dark have different directions, which is what is clustered.
    """

    name = "pixels"
    size = (224, 224)
    after = 0

    def frames(self, wanted: int, available: int) -> int:
        """As many as wanted."""
        return min(wanted, available)

    def grid(self, frames: int) -> Grid:
        """14 x 14 patches."""
        return frames, 14, 14

    def encode(self, frames: Tensor) -> Tensor:
        """(T * 196, 49) float32: colors from -1 to 1, and a constant as long as gray at half brightness."""
        means: Tensor = adaptive_avg_pool2d(frames.float() / 127.5 - 1, (56, 56))
        patches = means.unflatten(3, (14, 4)).unflatten(2, (14, 4))  # (T, 3, 14, 4, 14, 4)
        colors = patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, 48)
        return torch.cat([colors, colors.new_full((len(colors), 1), 0.5 * math.sqrt(48))], 1)


class AnswererEncoder:
    """The encoder of a `VideoAnswerer`, which takes a fixed number of small frames; short clips repeat theirs."""

    name = "its own"
    after = 0

    def __init__(self, model: VideoAnswerer) -> None:
        self.model = model
        self.size = (model.config.side, model.config.side)

    def frames(self, wanted: int, available: int) -> int:
        """Always the same."""
        return self.model.config.frames

    def grid(self, frames: int) -> Grid:
        """That of its configuration."""
        return self.model.config.grid

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """(T * h * w, token_width)."""
        return self.model.encode(frames[None].to(self.model.project.weight.device)).embeddings[0]


class ChatEncoder:
    """The encoder and projector of a LLaVA-OneVision, with its newline."""

    name = "llava_onevision"
    after = NEWLINES

    def __init__(self, chat: VideoChat) -> None:
        self.chat = chat
        self.size = chat.size

    def frames(self, wanted: int, available: int) -> int:
        """As many as wanted."""
        return min(wanted, available)

    def grid(self, frames: int) -> Grid:
        """Pooled or not, as the reducer reads them."""
        return self.chat.grid(frames)

    def encode(self, frames: Tensor) -> Tensor:
        """(T * h * w + 1, D)."""
        return self.chat.encode(frames)
