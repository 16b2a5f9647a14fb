"""VQToken in lmms-eval, found through its entry points as the model `tokenthrift_vqtoken`.

    python -m lmms_eval --model tokenthrift_vqtoken \\
        --model_args pretrained=converted,budget=33,max_frames_num=32 --tasks nextqa_mc_test --batch_size 1

Written against lmms-eval 0.7.3: `lmms_eval.models.registry_v2.ModelManifest`, the entry point group
`lmms_eval.models`, and a "simple" model of `lmms_eval.api.model.lmms`. Nothing of lmms-eval is imported before it asks.

One process, one video or none a question, greedy. Frames are spread evenly over the video, without a word of time in
the prompt, as in the published evaluation. A video that cannot be read, or is too short for the budget, is logged and
gets an empty answer, which counts as wrong; upstream's adapters answer it without a video. The mean number of tokens is
logged at the end, for TokDense.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import new_class
from typing import Any

from tokenthrift.budget import BudgetError, TokenUsage
from tokenthrift.harnesses.reduced_model import place
from tokenthrift.media.video import VideoError, probe, read_frames
from tokenthrift.vqtoken.video_lm.chat import VideoChat

__all__ = ["manifest"]

_NAME = "LmmsVQToken"
_PLACEHOLDERS = ("<image>", "<video>")
_log = logging.getLogger("lmms-eval")


def manifest() -> Any:
    """What lmms-eval's registry takes: the model's name and where its class is."""
    registry = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="tokenthrift_vqtoken", simple_class_path=f"{__name__}.{_NAME}")


def __getattr__(name: str) -> Any:
    # The class needs lmms-eval for its base, this module does not.
    if name == _NAME:
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _model_class() -> type:
    bases = (_Model, import_module("lmms_eval.api.model").lmms)
    return new_class(_NAME, bases, exec_body=lambda body: body.update(__module__=__name__))


class _Model:
    """Everything of the model but lmms-eval's base class.

    Args:
        pretrained: A converted checkpoint, or a LLaVA-OneVision of transformers, which gets VQToken without weights.
        budget: Ceilings for each video, newline included; several are joined by `+` (`33+4/s`), since lmms-eval
            splits its arguments at commas.
        max_frames_num: Frames of a video.
        device: Where the model runs; the GPU if there is one, else the CPU.
        dtype: Of the language model; bfloat16 on a GPU and float32 on a CPU.
        batch_size: 1.
        selection_method: "elbow" or "silhouette" lets content decide how many codes a video gets, "fixed" does not;
            that of the checkpoint if not given.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

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
        super().__init__()
        if int(batch_size) != 1 or int(os.environ.get("WORLD_SIZE", "1")) != 1:
            raise ValueError("tokenthrift_vqtoken answers one question at a time in one process: --batch_size 1")
        device, precision = place(device, dtype)
        self.chat = VideoChat.from_pretrained(
            pretrained, device=device, dtype=precision, selection_method=selection_method
        )
        self.budget = str(budget).replace("+", ",")
        self.num_frames = int(max_frames_num)
        self.chat.check(self.num_frames, self.budget)
        self.usages: list[TokenUsage] = []

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer to every request, in their order, with the tokens that the harness counts."""
        instance, answers = import_module("lmms_eval.api.instance"), []
        for request in requests:
            question, settings, visuals, number, task, split = request.args
            before = len(self.usages)
            answer = self._answer(question, settings, visuals(self.task_dict[task][split][number]))
            self.cache_hook.add_partial("generate_until", (question, settings), answer)
            visual = sum(usage.used for usage in self.usages[before:])
            counts = instance.TokenCounts(
                input_tokens=self.chat.prompt_tokens(question) + visual, output_tokens=self.chat.text_tokens(answer)
            )
            answers.append(instance.GenerationResult(answer, counts))
        if self.usages:
            tokens = sum(usage.used for usage in self.usages) / len(self.usages)
            _log.info(f"VQToken: {len(self.usages)} videos, {tokens:.2f} tokens each, newline included")
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: every task of the paper is answered in words."""
        raise NotImplementedError("tokenthrift_vqtoken answers in words; choose a task of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("tokenthrift_vqtoken answers one question at a time")

    def _answer(self, question: str, settings: dict[str, Any], visuals: Sequence[Any] | None) -> str:
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise ValueError(f"tokenthrift_vqtoken decodes greedily, not with {settings}")
        for placeholder in _PLACEHOLDERS:
            question = question.replace(placeholder, "")
        until = settings.get("until") or ()
        respond: Callable[..., Any] = self.chat.answer
        options = {
            "max_new_tokens": int(settings.get("max_new_tokens", 512)),
            "stop": (until,) if isinstance(until, str) else tuple(until),
        }
        if not visuals:
            return str(respond(None, question.strip(), **options).text)
        if len(visuals) != 1 or not isinstance(visuals[0], str):
            kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
            raise ValueError(f"tokenthrift_vqtoken reads one video file a question, not {len(visuals)} of {kinds}")
        try:
            info = probe(visuals[0])
            frames = read_frames(visuals[0], count=self.num_frames, size=self.chat.size).pixels
            answer = respond(frames, question.strip(), self.budget, seconds=info.seconds, **options)
        except (VideoError, BudgetError) as error:
            _log.error(f"{visuals[0]}: {getattr(error, 'reason', error)}; answered with nothing")
            return ""
        self.usages.append(answer.usage)
        return str(answer.text)
