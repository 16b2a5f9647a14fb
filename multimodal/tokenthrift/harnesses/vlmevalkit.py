"""Any reducer in any family that `attach` knows, in VLMEvalKit, which has no plug-in point: `register` adds a model.

    python -m tokenthrift.harnesses.vlmevalkit --pretrained llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\
        --reducer merging --budget 25% -- --data MMBench_DEV_EN Video-MME_8frame --model Tokenthrift

The command registers the model `Tokenthrift` and then runs VLMEvalKit's own `run.py` with what follows `--`: that of
the current folder, or `vlmeval.run` of an installed package.

Written against `vlmeval.vlm.base.BaseModel` (`generate_inner(message, dataset)` over `[{type, value}]`, `VIDEO_LLM`,
`nframe`, which the data set overrules) and the table `vlmeval.config.supported_VLM` as of VLMEvalKit 0.3; tried with
the package ms-vlmeval 0.0.20, which is VLMEvalKit on the package index. VLMEvalKit keeps no token counts beside its
predictions, so each question's are logged, and a table by data set stands at the end. Greedy. A film that cannot be
read, or is too short for the budget, is logged and gets an empty answer.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from tokenthrift.budget import BudgetError, BudgetLike
from tokenthrift.harnesses.base import harness_class
from tokenthrift.harnesses.reduced_model import Reduced, ReducedModel
from tokenthrift.media.video import VideoError

__all__ = ["main", "register", "run_kit"]

_log = logging.getLogger("tokenthrift")


def register(
    name: str,
    pretrained: str,
    *,
    reducer: str = "merging",
    budget: BudgetLike = "25%",
    max_new_tokens: int = 512,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Adds a model to VLMEvalKit's table; the weights are loaded when VLMEvalKit asks for it.

    Args:
        name: its name for `--model`.
        pretrained: a folder or Hub id of a vision-language model.
        reducer: a name that `attach` takes, "none", or a model folder.
        budget: for each picture or clip.
        max_new_tokens: of an answer.
        device: the GPU if there is one, else the CPU, if not given.
        dtype: bfloat16 on a GPU and float32 on a CPU, if not given.
    """
    kind = harness_class(_Model, "ReducedVLM", "vlmeval.vlm.base:BaseModel")
    models = import_module("vlmeval.config").supported_VLM
    models[name] = partial(kind, pretrained, reducer, budget, max_new_tokens, device, dtype)


def run_kit(
    parser: argparse.ArgumentParser, name: str, register: Callable[..., None], argv: Sequence[str] | None
) -> None:
    """Registers a model and runs VLMEvalKit's own script as if it had been started itself.

    Args:
        parser: of the arguments of `register` that are not every model's; those are added.
        name: the model's, if not given.
        register: called with all arguments by name.
        argv: what follows `--` goes to the script: run.py of the current folder, else of the installed package.
    """
    parser.add_argument("--name", default=name, help=f"the model's name (default: {name})")
    parser.add_argument("--device", help="the GPU if there is one, else the CPU, if not given")
    parser.add_argument("--dtype", help="bfloat16 on a GPU and float32 on a CPU, if not given")
    parser.add_argument("rest", nargs="*", metavar="-- ...", help="arguments of VLMEvalKit's run.py")
    arguments = vars(parser.parse_args(argv))
    rest = arguments.pop("rest")
    sys.path.insert(0, str(Path.cwd()))  # where run.py of a checkout looks for vlmeval
    checkout = Path("run.py").is_file()
    if not checkout and not _is_installed():
        parser.error("there is no run.py here; change to the folder of VLMEvalKit first, or install ms-vlmeval")
    register(**arguments)
    sys.argv = ["run.py", *rest]
    if checkout:
        runpy.run_path("run.py", run_name="__main__")
    else:
        runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)


def _is_installed() -> bool:
    try:
        return find_spec("vlmeval.run") is not None
    except (ImportError, ValueError):
        return False


def main(argv: Sequence[str] | None = None) -> None:
    """Registers the model, runs VLMEvalKit and prints what the questions cost."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenthrift.harnesses.vlmevalkit",
        description="Run VLMEvalKit with a reduced vision-language model among its models.",
    )
    parser.add_argument("--pretrained", required=True, help="a folder or Hub id of a vision-language model")
    parser.add_argument("--reducer", default="merging", help="by name, or a folder (default: merging)")
    parser.add_argument("--budget", default="25%", help="for each picture or clip (default: 25%%)")
    try:
        run_kit(parser, "Tokenthrift", register, argv)
    finally:
        for line in _Model.table():
            print(line)


@dataclass(slots=True)
class _Cost:
    """What the questions of a data set took."""

    questions: int = 0
    seconds: float = 0.0
    read: int = 0
    written: int = 0
    native: int = 0
    used: int = 0


class _Model:
    """Everything of the model but VLMEvalKit's base class."""

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = True
    allowed_types = ("text", "image", "video")
    nframe = 32
    fps = 0  # a data set sampled by rate is refused by VLMEvalKit itself
    costs: ClassVar[dict[str, _Cost]] = {}

    def __init__(
        self,
        pretrained: str,
        reducer: str,
        budget: BudgetLike,
        max_new_tokens: int,
        device: str | None,
        dtype: str | None,
        **options: Any,
    ) -> None:
        if options.pop("use_vllm", False) or options:  # a model named after a Qwen is given use_vllm=False
            raise TypeError(f"{type(self).__name__} takes no {', '.join(options) or 'use_vllm'}")
        super().__init__()
        self.reduced = ReducedModel(pretrained, reducer, budget, device=device, dtype=dtype)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of texts, pictures and clips; media stand before the words."""
        from PIL import Image

        question = "\n".join(str(part["value"]) for part in message if part["type"] == "text")
        seen = [part for part in message if part["type"] != "text"]
        visuals = [Image.open(part["value"]) if part["type"] == "image" else part["value"] for part in seen]
        self.reduced.num_frames = self.nframe
        start = time.perf_counter()
        try:
            result = self.reduced.answer(question, visuals, max_new_tokens=self.max_new_tokens)
        except (VideoError, BudgetError) as error:
            names = ", ".join(str(part["value"]) for part in seen)
            _log.error("%s: %s; answered with nothing", names, getattr(error, "reason", error))
            result = Reduced("", 0, 0, ())
        self._count(dataset or "", result, time.perf_counter() - start)
        return result.text

    def _count(self, dataset: str, result: Reduced, seconds: float) -> None:
        cost = self.costs.setdefault(dataset, _Cost())
        cost.questions += 1
        cost.seconds += seconds
        cost.read += result.input_tokens
        cost.written += result.output_tokens
        cost.native += sum(item.native for item in result.usage)
        cost.used += sum(item.used for item in result.usage)
        _log.info("%s: %d tokens read, %d written, %.2f s", dataset, result.input_tokens, result.output_tokens, seconds)

    @classmethod
    def table(cls) -> list[str]:
        """Lines of what each data set cost."""
        return [
            f"{name}: {c.questions} questions, {c.seconds:.1f} s, total_input_tokens: {c.read}, "
            f"total_output_tokens: {c.written}, native_visual_tokens: {c.native}, visual_tokens: {c.used}"
            for name, c in cls.costs.items()
        ]


if __name__ == "__main__":
    main()
