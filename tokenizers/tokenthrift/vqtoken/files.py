"""VQToken on video files, for `tokenthrift tokenize` and `tokenthrift plan`.

The cost of a clip follows from its number of frames and the grid of the encoder, so `plan` reads only headers. Native
tokens come from the model's own encoder: that of a VideoAnswerer, or the language model that `tokenthrift convert`
wrote beside a VQToken; a VQToken alone, without weights, reduces patches of pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, ItemSize, TokenBudget, TokenUsage
from tokenthrift.hub import CONFIG
from tokenthrift.media.picture_track import read_track
from tokenthrift.media.suffixes import VIDEO_SUFFIXES
from tokenthrift.media.video import VideoError, probe, read_frames, spread
from tokenthrift.tokenize import USAGE_COLUMNS, Column, usage_row
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer
from tokenthrift.vqtoken.video_lm.chat import VLM, VideoChat
from tokenthrift.vqtoken.video_lm.encoders import AnswererEncoder, ChatEncoder, ClipEncoder, PixelPatches

__all__ = ["VideoFiles", "sample"]


class Sampled(NamedTuple):
    """(T, 3, height, width) uint8 frames, when each is shown, how long the clip is, and its width by its height."""

    pixels: Tensor
    times: Tensor
    seconds: float
    aspect: float


class VideoFiles:
    """A `FileTokenizer` of clips.

    Args:
        model: a VQToken, or a VideoAnswerer, which has one.
        options: the parsed options of `add_options`, and the model's name.

    Raises:
        ValueError: `--frames` is below 1, or the model reads tokens of a language model that is not beside it.
    """

    noun = "video"
    suffixes = VIDEO_SUFFIXES
    columns: ClassVar[Mapping[str, Column]] = {
        **USAGE_COLUMNS,
        "seconds": "float",
        "frames": "int",
        "encoder": "text",
        "codes": "regions",
    }

    def __init__(self, model: VQToken | VideoAnswerer, options: argparse.Namespace) -> None:
        if options.frames < 1:
            raise ValueError(f"--frames {options.frames}: a clip has at least one frame")
        self.num_frames = options.frames
        self.codes = options.codes
        self.reducer = model.vqtoken if isinstance(model, VideoAnswerer) else model
        self.encoder: ClipEncoder
        if isinstance(model, VideoAnswerer):
            self.encoder = AnswererEncoder(model)
        elif (Path(options.model) / VLM / CONFIG).is_file():
            self.encoder = ChatEncoder(_chat(model, Path(options.model)))
        elif model.config.attention is not None:
            raise ValueError(
                f"{options.model} holds no {VLM}/{CONFIG}: its attention reads tokens of a language model "
                f"({model.config.attention.hidden_size} wide), whose encoder is not there; "
                "`tokenthrift convert vqtoken` writes both into one folder"
            )
        else:
            self.encoder = PixelPatches()

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Adds the options of VQToken models."""
        group = parser.add_argument_group("of VQToken models")
        group.add_argument(
            "--frames", type=int, default=16, metavar="N", help="frames of a clip, evenly spread (default: 16)"
        )
        group.add_argument(
            "--codes", action="store_true", help="also write the share of the clip and the position of every code"
        )

    def plan(self, path: Path, budget: TokenBudget) -> TokenUsage:
        """See `FileTokenizer.plan`; no frame is decoded. A clip too short for its budget fails alone."""
        info = probe(path)
        cost = self._cost(self.encoder.num_frames(self.num_frames, info.frames), info.seconds, budget)
        if isinstance(cost, BudgetError):
            raise VideoError(path, str(cost))
        return cost

    def read(self, path: Path) -> Sampled:
        """Frames spread evenly over the clip."""
        return sample(path, self.encoder, self.num_frames)

    def tokenize(self, items: Sequence[Sampled], budget: TokenBudget) -> list[dict[str, Any]]:
        """See `FileTokenizer.tokenize`: native, cap, tokens, error; seconds, frames, encoder, codes."""
        costs = [self._cost(len(item.pixels), item.seconds, budget) for item in items]
        rows: list[dict[str, Any]] = [{"failed": str(cost)} for cost in costs]
        able = [i for i, cost in enumerate(costs) if not isinstance(cost, BudgetError)]
        if not able:
            return rows
        grids = [self.encoder.grid(len(items[i].pixels)) for i in able]
        features = [self.encoder.encode(items[i].pixels).float() for i in able]
        found = self.reducer.compress(TokenBatch.from_items(features, [items[i].seconds for i in able], grids), budget)
        for i, usage, index_map in zip(able, found.tokens.usage, found.maps, strict=True):
            item = items[i]
            rows[i] = usage_row(usage)
            rows[i] |= {"seconds": round(item.seconds, 3), "frames": len(item.pixels), "encoder": self.encoder.name}
            if self.codes:
                rows[i]["codes"] = _codes(index_map.cpu(), item.times)
        return rows

    def _cost(self, frames: int, seconds: float, budget: TokenBudget) -> TokenUsage | BudgetError:
        """What a clip will use, or why it cannot keep to the budget.

        Raises:
            BudgetError: the model honors no such budget, whatever the clip.
        """
        self.reducer.support.check(budget)
        count, height, width = self.encoder.grid(frames)
        native = count * height * width + self.encoder.after
        item = ItemSize(native=native, seconds=seconds, frames=count, height=height, width=width)
        try:
            return self.reducer.plan([item], budget)[0]
        except BudgetError as error:
            return error


def sample(path: Path, encoder: ClipEncoder, num_frames: int) -> Sampled:
    """Frames of a clip, evenly spread, as many as an encoder reads; a clip of fewer frames repeats them.

    Raises:
        VideoError: the clip cannot be read.
    """
    info = read_track(path).info  # a header may count frames that are not there
    count = encoder.num_frames(num_frames, info.frames)
    frames = read_frames(path, indices=spread(info.frames, count), size=encoder.size)
    return Sampled(frames.pixels, frames.seconds, info.seconds, info.width / info.height)


def _chat(reducer: VQToken, folder: Path) -> VideoChat:
    """The language model beside a VQToken: its configuration alone where the VQToken itself has no memory yet."""
    device = next((p.device for p in reducer.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return VideoChat.from_pretrained(folder, device=device)
    from transformers import AutoConfig, LlavaOnevisionForConditionalGeneration

    with torch.device("meta"):
        return VideoChat(
            LlavaOnevisionForConditionalGeneration(AutoConfig.from_pretrained(folder / VLM)), None, reducer
        )


def _codes(index_map: Tensor, times: Tensor) -> list[dict[str, float]]:
    """Share of the cells of every code, and the middle of them: seconds, and row and column from 0 to 1."""
    frames, height, width = index_map.shape
    rows = []
    for code in range(int(index_map.max()) + 1):
        frame, row, column = (index_map == code).nonzero(as_tuple=True)
        region = {
            "share": len(frame) / index_map.numel(),
            "second": float(times[frame].mean()),
            "row": (float(row.float().mean()) + 0.5) / height,
            "column": (float(column.float().mean()) + 0.5) / width,
        }
        rows.append({name: round(value, 4) for name, value in region.items()})
    return rows
