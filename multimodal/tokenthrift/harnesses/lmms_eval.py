"""Any reducer in any family that `attach` knows, in lmms-eval: the model `tokenthrift` of its entry points.

    python -m lmms_eval --model tokenthrift --tasks mme,videomme --batch_size 1 \\
        --model_args pretrained=llava-hf/llava-onevision-qwen2-0.5b-ov-hf,reducer=merging,budget=25%

Written against lmms-eval 0.7.3: `registry_v2.ModelManifest`, the entry point group `lmms_eval.models`, a "simple" model
of `lmms_eval.api.model.lmms`, and `GenerationResult`, by which the harness counts tokens for each correct answer.
Nothing of lmms-eval is imported before it asks. A film that cannot be read, or is too short for the budget, is logged
and gets an empty answer, which counts as wrong.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import new_class
from typing import Any

from tokenthrift.budget import BudgetError
from tokenthrift.harnesses.reduced_model import Reduced, ReducedModel
from tokenthrift.media.video import VideoError

__all__ = ["manifest"]

_NAME = "LmmsReduced"
_PLACEHOLDERS = ("<image>", "<video>")
_log = logging.getLogger("lmms-eval")


def manifest() -> Any:
    """What lmms-eval's registry takes: the model's name and where its class is."""
    registry = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id="tokenthrift", simple_class_path=f"{__name__}.{_NAME}")


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
        pretrained: a folder or Hub id of a vision-language model.
        reducer: a name of `tokenthrift.reducers.REDUCERS`, "vqtoken", "none", or a model folder.
        budget: for each picture or clip; several fields are joined by `+` (`33+4/s`), since lmms-eval splits at commas.
        max_frames_num: frames of a clip.
        device: the GPU if there is one, else the CPU.
        dtype: bfloat16 on a GPU, float32 on a CPU.
        batch_size: 1.
    """

    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        pretrained: str,
        reducer: str = "merging",
        budget: str | int | float = "25%",
        max_frames_num: int = 32,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(batch_size) != 1 or int(os.environ.get("WORLD_SIZE", "1")) != 1:
            raise ValueError("tokenthrift answers one question at a time in one process: --batch_size 1")
        self.reduced = ReducedModel(
            pretrained,
            reducer,
            str(budget).replace("+", ","),
            device=device,
            dtype=dtype,
            num_frames=int(max_frames_num),
        )

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer to every request, in their order, with its token counts."""
        instance = import_module("lmms_eval.api.instance")
        answers, results, start = [], [], time.perf_counter()
        for request in requests:
            question, settings, visuals, number, task, split = request.args
            result = self._answer(question, settings, visuals(self.task_dict[task][split][number]) or ())
            self.cache_hook.add_partial("generate_until", (question, settings), result.text)
            counts = instance.TokenCounts(input_tokens=result.input_tokens, output_tokens=result.output_tokens)
            answers.append(instance.GenerationResult(result.text, counts))
            results.append(result)
        self._log(results, time.perf_counter() - start)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: a reduced prompt has no logits at the native positions of the harness."""
        raise NotImplementedError("tokenthrift answers in words; choose a task of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("tokenthrift answers one question at a time")

    def _answer(self, question: str, settings: dict[str, Any], visuals: Sequence[Any]) -> Reduced:
        if settings.get("do_sample") or (settings.get("num_beams") or 1) != 1:
            raise ValueError(f"tokenthrift decodes greedily, not with {settings}")
        for placeholder in _PLACEHOLDERS:
            question = question.replace(placeholder, "")
        until = settings.get("until") or ()
        try:
            return self.reduced.answer(
                question.strip(),
                visuals,
                max_new_tokens=int(settings.get("max_new_tokens", 512)),
                stop=(until,) if isinstance(until, str) else tuple(until),
            )
        except (VideoError, BudgetError) as error:
            _log.error(f"{visuals}: {getattr(error, 'reason', error)}; answered with nothing")
            return Reduced("", 0, 0, ())

    def _log(self, results: Sequence[Reduced], seconds: float) -> None:
        """The harness's own line of time and speed, and what pictures and clips cost."""
        usage = [item for result in results for item in result.usage]
        written = sum(result.output_tokens for result in results)
        visual = {"native_visual_tokens": sum(u.native for u in usage), "visual_tokens": sum(u.used for u in usage)}
        metrics = import_module("lmms_eval.models.model_utils.gen_metrics")
        metrics.log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=written,
            avg_speed=written / seconds,
            additional_metrics={"questions": len(results), **visual},
        )
