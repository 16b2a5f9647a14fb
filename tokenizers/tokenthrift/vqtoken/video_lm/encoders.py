"""What makes the native tokens of a clip: the encoder of a model, or patches of pixels.

VQToken clusters the tokens of any encoder. The encoders here share one shape, so the commands and the evaluation on
files work with each of them. Each gives the grid of a clip before a frame is decoded.
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
        name: its name in tables.
        size: height and width of the frames that it reads.
        after: tokens after those of the frames, such as a newline.
    """

    name: str
    size: tuple[int, int]
    after: int

    def num_frames(self, most: int, available: int) -> int:
        """How many frames it reads of a clip of `available` frames, if `most` are to be read."""

    def grid(self, frames: int) -> Grid:
        """Frames, rows and columns of tokens."""

    def encode(self, frames: Tensor) -> Tensor:
        """(T, 3, height, width) uint8 to (N, D): the tokens of the grid in raster order, and those after them."""


class PixelPatches:
    """No encoder: a token is a patch of 16 pixels, as 4 x 4 mean colors. A baseline for trained encoders.

    One coordinate is the same for all, so that bright and dark have different directions, which is what is clustered.
    """

    name = "pixels"
    size = (224, 224)
    after = 0

    def num_frames(self, most: int, available: int) -> int:
        """At most `most`."""
        return min(most, available)

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
    """The encoder of a `VideoAnswerer`, which reads a fixed number of small frames; short clips repeat theirs."""

    name = "its own"
    after = 0

    def __init__(self, model: VideoAnswerer) -> None:
        self.model = model
        self.size = (model.config.image_size, model.config.image_size)

    def num_frames(self, most: int, available: int) -> int:
        """Always the number of its configuration."""
        return self.model.config.num_frames

    def grid(self, frames: int) -> Grid:
        """That of its configuration."""
        return self.model.config.grid

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """(T * h * w, token_dim)."""
        return self.model.encode(frames[None].to(self.model.project.weight.device)).embeddings[0]


class ChatEncoder:
    """The encoder and projector of a LLaVA-OneVision, with its newline."""

    name = "llava_onevision"
    after = NEWLINES

    def __init__(self, chat: VideoChat) -> None:
        self.chat = chat
        self.size = chat.size

    def num_frames(self, most: int, available: int) -> int:
        """At most `most`."""
        return min(most, available)

    def grid(self, frames: int) -> Grid:
        """Pooled or not, as the reducer reads them."""
        return self.chat.grid(frames)

    def encode(self, frames: Tensor) -> Tensor:
        """(T * h * w + 1, D)."""
        return self.chat.encode(frames)
