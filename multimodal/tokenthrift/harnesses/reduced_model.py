"""A vision-language model of transformers with a reducer, as harnesses ask it: text, pictures and clips to text.

Not part of a paper. A harness has one question at a time and reports time and tokens; what it calls input tokens is
here what the language model read, after the reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetLike, TokenUsage
from tokenthrift.extras import require
from tokenthrift.media.video import probe, read_frames
from tokenthrift.models import load
from tokenthrift.reducers import REDUCERS
from tokenthrift.registry import resolve, those_with

__all__ = ["Reduced", "ReducedModel", "device_and_dtype", "reducer_of"]


@dataclass(frozen=True, slots=True)
class Reduced:
    """An answer and what it cost.

    Attributes:
        text: without surrounding space.
        input_tokens: what the language model read: text, and pictures and clips after the reduction.
        output_tokens: what it wrote.
        usage: of each picture or clip.
    """

    text: str
    input_tokens: int
    output_tokens: int
    usage: tuple[TokenUsage, ...]


def reducer_of(name: str) -> Any:
    """A reducer by its name in `REDUCERS`, "vqtoken" without weights, a folder or Hub id of one, or "none".

    Raises:
        ValueError: there is no such reducer.
    """
    if name == "none":
        return None
    if name in REDUCERS:
        return REDUCERS[name]()
    if name == "vqtoken":
        return resolve(those_with("model")[name])()
    if "/" in name or Path(name).is_dir():
        return load(name)
    raise ValueError(f"no reducer {name!r}; there are none, {', '.join(sorted({*REDUCERS, 'vqtoken'}))}, or a folder")


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """Where a model runs and how it computes: a GPU that is there in bfloat16, else the CPU in float32.

    Args:
        device: as harnesses name it; a GPU that is not there becomes the CPU.
        dtype: by name, whatever the device.
    """
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))


class ReducedModel:
    """A model with its processor, and a reducer that is attached for each answer.

    Args:
        source: a folder or Hub id of a family that `attach` knows.
        reducer: see `reducer_of`.
        budget: for each picture or clip.
        device: the GPU if there is one, else the CPU, if not given. A GPU that is not there becomes the CPU.
        dtype: bfloat16 on a GPU and float32 on a CPU, if not given.
        num_frames: of a clip, spread evenly.
    """

    def __init__(
        self,
        source: str,
        reducer: str = "merging",
        budget: BudgetLike = "25%",
        *,
        device: str | None = None,
        dtype: str | None = None,
        num_frames: int = 32,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device, precision = device_and_dtype(device, dtype)
        self.reducer, self.budget, self.num_frames = reducer_of(reducer), budget, num_frames
        self.model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=precision).to(device).eval()
        self.processor: Any = AutoProcessor.from_pretrained(source)

    @torch.inference_mode()
    def answer(
        self, question: str, visuals: Sequence[Any] = (), *, max_new_tokens: int = 512, stop: Sequence[str] = ()
    ) -> Reduced:
        """Answers a question, greedily.

        Args:
            question: in words, without placeholders.
            visuals: pictures of Pillow, and paths of films, in any order; each stands before the question.
            max_new_tokens: of the answer.
            stop: texts at the first of which an answer ends.

        Raises:
            ValueError: something that is neither a picture nor the path of a film.
            VideoError: a film that cannot be read.
            BudgetError: the budget cannot be honored.
        """
        picture = require("PIL.Image").Image
        images = [visual.convert("RGB") for visual in visuals if isinstance(visual, picture)]
        films = [str(visual) for visual in visuals if isinstance(visual, str | Path)]
        if len(images) + len(films) != len(visuals):
            raise ValueError(f"visuals are pictures or paths, not {sorted({type(v).__name__ for v in visuals})}")
        content = [{"type": "image" if isinstance(visual, picture) else "video"} for visual in visuals]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True)
        given: dict[str, Any] = {"images": images} if images else {}
        if films:
            given["videos"] = [read_frames(path, count=self.num_frames).pixels for path in films]
        inputs = self.processor(text=[prompt], return_tensors="pt", **given).to(self.model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        seconds = [probe(path).seconds for path in films]
        durations = seconds if films and not images else None
        reduced = self.reducer is not None and visuals
        with attach(self.model, self.reducer, self.budget, seconds=durations) if reduced else nullcontext() as handle:
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        usage = tuple(handle.usage) if handle is not None else ()
        native = inputs["input_ids"].shape[1]
        written = out[0, native:]
        text = self.processor.decode(written, skip_special_tokens=True)
        for end in filter(None, stop):
            text = text.partition(end)[0]
        saved = sum(item.native - item.used for item in usage)
        return Reduced(text.strip(), native - saved, len(written), usage)
