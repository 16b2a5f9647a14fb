"""VQToken in lmms-eval, found through its entry points as the model `tokenthrift_vqtoken`.

    python -m lmms_eval --model tokenthrift_vqtoken \\
        --model_args pretrained=converted,budget=33,max_frames_num=32 --tasks nextqa_mc_test --batch_size 1

What all models of lmms-eval share is in `tokenthrift.harnesses.base`.

One video or none a question. Frames are spread evenly over the video, without a word of time in the prompt, as in the
published evaluation. Upstream's adapters answer a video that cannot be read without it; here the answer is empty. The
mean number of tokens is logged at the end, for TokDense.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from tokenthrift.budget import TokenUsage
from tokenthrift.harnesses import base
from tokenthrift.harnesses.reduced_model import Reduced, device_and_dtype
from tokenthrift.media.video import probe, read_frames
from tokenthrift.vqtoken.video_lm.chat import VideoChat

__all__ = ["manifest"]

_NAME = "LmmsVQToken"
_log = logging.getLogger("lmms-eval")


class _Model(base.LmmsModel):
    """Everything of the model but lmms-eval's base class.

    Args:
        pretrained: A converted checkpoint, or a LLaVA-OneVision of transformers, which gets VQToken without weights.
        budget: Ceilings for each video, newline included; several are joined by `+` (`33+4/s`), since lmms-eval
            splits its arguments at commas.
        max_frames_num: Frames of a video.
        device: Where the model runs; the GPU if there is one, else the CPU.
        dtype: Of the language model; bfloat16 on a GPU and float32 on a CPU.
        batch_size: 1.
        selection_method: "gain", "elbow" or "silhouette" lets content decide how many codes a video gets, "fixed" does
            not; that of the checkpoint if not given.
    """

    model_id = "tokenthrift_vqtoken"

    def __init__(
        self,
        pretrained: str,
        budget: str | int = 33,
        max_frames_num: int = 32,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        selection_method: str | None = None,
    ) -> None:
        super().__init__(batch_size)
        device, precision = device_and_dtype(device, dtype)
        self.chat = VideoChat.from_pretrained(
            pretrained, device=device, dtype=precision, selection_method=selection_method
        )
        self.budget = str(budget).replace("+", ",")
        self.num_frames = int(max_frames_num)
        self.chat.check(self.num_frames, self.budget)
        self.usages: list[TokenUsage] = []

    def answer(self, question: str, visuals: Sequence[Any], max_new_tokens: int, stop: tuple[str, ...]) -> Reduced:
        """One video file or none."""
        frames, seconds = None, None
        if visuals:
            if len(visuals) != 1 or not isinstance(visuals[0], str):
                kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
                raise ValueError(f"{self.model_id} reads one video file a question, not {len(visuals)} of {kinds}")
            seconds = probe(visuals[0]).seconds
            frames = read_frames(visuals[0], count=self.num_frames, size=self.chat.size).pixels
        answer = self.chat.answer(
            frames, question, self.budget, seconds=seconds, max_new_tokens=max_new_tokens, stop=stop
        )
        usage = () if answer.usage is None else (answer.usage,)
        self.usages += usage
        read = self.chat.prompt_tokens(question) + sum(item.used for item in usage)
        return Reduced(answer.text, read, self.chat.text_tokens(answer.text), usage)

    def report(self, results: Sequence[Reduced], seconds: float) -> None:
        """The mean over all videos so far."""
        if self.usages:
            tokens = sum(usage.used for usage in self.usages) / len(self.usages)
            _log.info(f"VQToken: {len(self.usages)} videos, {tokens:.2f} tokens each, newline included")


manifest = partial(base.manifest, _Model, _NAME)
__getattr__ = base.lazy_model(_Model, _NAME)
