"""VQToken in VLMEvalKit, which has no plug-in point: `register()` adds it to the models of the running process.

    cd VLMEvalKit
    python -m tokenthrift.vqtoken.harnesses.vlmevalkit --pretrained FOLDER --budget 33 -- \\
        --data Video-MME_8frame --model VQToken

The second line registers the model `VQToken` and then runs VLMEvalKit's own `run.py` with what follows `--`: that of
the current folder, or of an installed package. From Python, call `register` before anything looks a model up.

Written against `vlmeval.vlm.base.BaseModel` (`generate_inner(message, dataset)` over `[{type, value}]`, `VIDEO_LLM`,
`nframe`, which the data set overrules) and the table `vlmeval.config.supported_VLM` as of VLMEvalKit 0.3. One video or
none a question, greedy. A video that cannot be read, or is too short for the budget, is logged and gets an empty
answer.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

from tokenthrift.budget import BudgetError
from tokenthrift.harnesses.base import harness_class
from tokenthrift.harnesses.reduced_model import device_and_dtype
from tokenthrift.harnesses.vlmevalkit import run_kit
from tokenthrift.media.video import VideoError, probe, read_frames
from tokenthrift.vqtoken.video_lm.chat import VideoChat

__all__ = ["main", "register"]

_log = logging.getLogger("tokenthrift")


def register(
    name: str,
    pretrained: str,
    *,
    budget: str | int = 33,
    max_new_tokens: int = 512,
    device: str | None = None,
    dtype: str | None = None,
    selection_method: str | None = None,
) -> None:
    """Adds a model to VLMEvalKit's table; the weights are loaded when VLMEvalKit asks for it.

    Args:
        name: Its name for `--model`.
        pretrained: A converted checkpoint, or a LLaVA-OneVision of transformers, which gets VQToken without weights.
        budget: Ceilings for each video, newline included.
        max_new_tokens: Of an answer.
        device: Where the model runs; the GPU if there is one, else the CPU.
        dtype: Of the language model; bfloat16 on a GPU and float32 on a CPU.
        selection_method: "fixed", "gain", "elbow" or "silhouette": how many codes a video gets; that of the checkpoint
            if not given.
    """
    models = import_module("vlmeval.config").supported_VLM
    kind = harness_class(_Model, "VQTokenModel", "vlmeval.vlm.base:BaseModel")
    models[name] = partial(kind, pretrained, budget, max_new_tokens, device, dtype, selection_method)


def main(argv: Sequence[str] | None = None) -> None:
    """Registers the model and runs VLMEvalKit's run.py."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenthrift.vqtoken.harnesses.vlmevalkit",
        description="Run VLMEvalKit with VQToken among its models.",
    )
    parser.add_argument("--pretrained", required=True, help="a converted checkpoint or a LLaVA-OneVision")
    parser.add_argument("--budget", default="33", help="ceilings for each video, newline included (default: 33)")
    parser.add_argument(
        "--selection-method", help="fixed, gain, elbow or silhouette: how many codes (default: that of the checkpoint)"
    )
    run_kit(parser, "VQToken", register, argv)


class _Model:
    """Everything of the model but VLMEvalKit's base class."""

    INSTALL_REQ = False
    INTERLEAVE = False
    VIDEO_LLM = True
    allowed_types = ("text", "video")
    nframe = 32
    fps = 0  # a data set sampled by rate is refused by VLMEvalKit itself

    def __init__(
        self,
        pretrained: str,
        budget: str | int,
        max_new_tokens: int,
        device: str | None,
        dtype: str | None,
        selection_method: str | None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(f"VQToken takes no {', '.join(unknown)}")
        super().__init__()
        device, precision = device_and_dtype(device, dtype)
        self.chat = VideoChat.from_pretrained(
            pretrained, device=device, dtype=precision, selection_method=selection_method
        )
        self.budget, self.max_new_tokens = str(budget), max_new_tokens

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of texts and at most one video."""
        question = "\n".join(str(part["value"]) for part in message if part["type"] == "text")
        videos = [part["value"] for part in message if part["type"] == "video"]
        if len(videos) > 1:
            raise ValueError(f"VQToken answers questions about one video, not {len(videos)}")
        if not videos:
            return self.chat.answer(None, question, max_new_tokens=self.max_new_tokens).text
        self.chat.check(self.nframe, self.budget)
        try:
            seconds = probe(videos[0]).seconds
            frames = read_frames(videos[0], count=self.nframe, size=self.chat.size).pixels
            return self.chat.answer(
                frames, question, self.budget, seconds=seconds, max_new_tokens=self.max_new_tokens
            ).text
        except (VideoError, BudgetError) as error:
            _log.error("%s: %s; answered with nothing", videos[0], getattr(error, "reason", error))
            return ""


if __name__ == "__main__":
    main()
