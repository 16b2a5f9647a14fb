"""What models of evaluation harnesses share: a base class that is imported at first use, and lmms-eval's interface.

Written against lmms-eval 0.7.3: `registry_v2.ModelManifest`, a "simple" model of `lmms_eval.api.model.lmms`, and
`GenerationResult`, by which the harness counts tokens for each correct answer. Nothing of a harness is imported before
it asks. A film that cannot be read, or is too short for the budget, is logged and gets an empty answer, which counts as
wrong.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import new_class
from typing import Any, ClassVar

from tokenthrift.budget import BudgetError
from tokenthrift.harnesses.reduced_model import Reduced
from tokenthrift.media.video import VideoError
from tokenthrift.registry import resolve

__all__ = ["LmmsModel", "harness_class", "lazy_model", "manifest"]

_PLACEHOLDERS = ("<image>", "<video>")
_log = logging.getLogger("lmms-eval")


@cache
def harness_class(own: type, name: str, base: str) -> type:
    """`own` with a harness's class as its base.

    Args:
        own: everything of the model but that base class.
        name: of the new class, in the module of `own`.
        base: as `module:class`, imported here.
    """
    return new_class(name, (own, resolve(base)), exec_body=lambda body: body.update(__module__=own.__module__))


def manifest(own: type[LmmsModel], name: str) -> Any:
    """What lmms-eval's registry takes: the model's name and where its class is."""
    registry = import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=own.model_id, simple_class_path=f"{own.__module__}.{name}")


def lazy_model(own: type, name: str) -> Callable[[str], Any]:
    """A module's `__getattr__` that makes the model of lmms-eval: the class needs lmms-eval, its module does not."""

    def find(requested: str) -> Any:
        if requested == name:
            return harness_class(own, name, "lmms_eval.api.model:lmms")
        raise AttributeError(f"module {own.__module__!r} has no attribute {requested!r}")

    return find


class LmmsModel(ABC):
    """A model of lmms-eval without its base class: one question at a time, in one process, greedily.

    Args:
        batch_size: 1.

    Attributes:
        model_id: its name for `--model`.
    """

    model_id: ClassVar[str]
    is_simple = True
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(self, batch_size: int | str) -> None:
        super().__init__()
        if int(batch_size) != 1 or int(os.environ.get("WORLD_SIZE", "1")) != 1:
            raise ValueError(f"{self.model_id} answers one question at a time in one process: --batch_size 1")

    @abstractmethod
    def answer(self, question: str, visuals: Sequence[Any], max_new_tokens: int, stop: tuple[str, ...]) -> Reduced:
        """The answer to a question without placeholders, and its token counts."""

    @abstractmethod
    def report(self, results: Sequence[Reduced], seconds: float) -> None:
        """Logs what the answers of one call took."""

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
        self.report(results, time.perf_counter() - start)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: a reduced prompt has no logits at the native positions of the harness."""
        raise NotImplementedError(f"{self.model_id} answers in words; choose a task of type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: every question has a prompt of its own, without the answers before it."""
        raise NotImplementedError(f"{self.model_id} reads one round; choose a task of type generate_until")

    def _answer(self, question: str, settings: dict[str, Any], visuals: Sequence[Any]) -> Reduced:
        if settings.get("do_sample") or (settings.get("num_beams") or 1) != 1:
            raise ValueError(f"{self.model_id} decodes greedily, not with {settings}")
        for placeholder in _PLACEHOLDERS:
            question = question.replace(placeholder, "")
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        try:
            return self.answer(question.strip(), visuals, int(settings.get("max_new_tokens", 512)), stop)
        except (VideoError, BudgetError) as error:
            shown = ", ".join(map(str, visuals))
            _log.error(f"{shown}: {getattr(error, 'reason', error)}; answered with nothing")
            return Reduced("", 0, 0, ())
