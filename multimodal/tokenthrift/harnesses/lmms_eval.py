"""Any reducer in any family that `attach` knows, in lmms-eval: the model `tokenthrift` of its entry points.

    python -m lmms_eval --model tokenthrift --tasks mme,videomme --batch_size 1 \\
        --model_args pretrained=llava-hf/llava-onevision-qwen2-0.5b-ov-hf,reducer=merging,budget=25%

What all models of lmms-eval share is in `tokenthrift.harnesses.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module

from tokenthrift.harnesses import base
from tokenthrift.harnesses.reduced_model import Reduced, ReducedModel

__all__ = ["manifest"]

_NAME = "LmmsReduced"


class _Model(base.LmmsModel):
    """Everything of the model but lmms-eval's base class.

    Args:
        pretrained: a folder or Hub id of a vision-language model.
        reducer: a name that `attach` takes, "none", or a model folder.
        budget: for each picture or clip; several fields are joined by `+` (`33+4/s`), since lmms-eval splits at commas.
        max_frames_num: frames of a clip.
        device: the GPU if there is one, else the CPU.
        dtype: bfloat16 on a GPU, float32 on a CPU.
        batch_size: 1.
    """

    model_id = "tokenthrift"

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
        super().__init__(batch_size)
        self.reduced = ReducedModel(
            pretrained,
            reducer,
            str(budget).replace("+", ","),
            device=device,
            dtype=dtype,
            num_frames=int(max_frames_num),
        )

    def answer(self, question: str, visuals: Sequence[object], max_new_tokens: int, stop: tuple[str, ...]) -> Reduced:
        """Pictures and clips in any number."""
        return self.reduced.answer(question, visuals, max_new_tokens=max_new_tokens, stop=stop)

    def report(self, results: Sequence[Reduced], seconds: float) -> None:
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


manifest = partial(base.manifest, _Model, _NAME)
__getattr__ = base.lazy_model(_Model, _NAME)
