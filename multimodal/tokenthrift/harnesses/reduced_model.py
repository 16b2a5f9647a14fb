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

from tokenthrift.attachment import attach, reducer_from
from tokenthrift.budget import BudgetLike, TokenBudget, TokenUsage
from tokenthrift.extras import require
from tokenthrift.media.video import probe, read_frames
from tokenthrift.models import load

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
    """A reducer by a name that `attach` knows, a folder or Hub id of one, or "none".

    Raises:
        ValueError: there is no such reducer.
    """
    if name == "none":
        return None
    if "/" in name or Path(name).is_dir():
        return load(name)
    return reducer_from(name)


def device_and_dtype(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """Where a model runs and how it computes: a GPU that is there in bfloat16, else the CPU in float32.

    Args:
        device: as harnesses name it; a GPU that is not there becomes the CPU.
        dtype: by name, whatever the device.
    """
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))


class _Clip:
    """Frames of a film and when each is shown, as processors of transformers ask for it: numbers at a steady rate.

    Milliseconds are such numbers whatever the film's rate is, also where it changes.
    """

    def __init__(self, path: str | Path, num_frames: int) -> None:
        frames, info = read_frames(path, count=num_frames), probe(path)
        self.pixels, self.seconds = frames.pixels, info.seconds
        self.metadata = {
            "total_num_frames": max(1, round(info.seconds * 1000)),
            "fps": 1000.0,
            "duration": info.seconds,
            "height": info.height,
            "width": info.width,
            "frames_indices": (frames.seconds * 1000).round().long().tolist(),
        }


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
        self._reads_clips = getattr(self.processor, "video_processor", None) is not None

    @torch.inference_mode()
    def answer(
        self, question: str, visuals: Sequence[Any] = (), *, max_new_tokens: int = 512, stop: Sequence[str] = ()
    ) -> Reduced:
        """Answers a question, greedily.

        Args:
            question: in words, without placeholders.
            visuals: pictures of Pillow, and paths of films, in any order; each stands before the question. A processor
                that reads no video gets the frames of a film as pictures.
            max_new_tokens: of the answer.
            stop: texts at the first of which an answer ends.

        Raises:
            ValueError: something that is neither a picture nor the path of a film.
            VideoError: a film that cannot be read.
            BudgetError: the budget cannot be honored.
        """
        picture = require("PIL.Image").Image
        unknown = sorted({type(v).__name__ for v in visuals if not isinstance(v, picture | str | Path)})
        if unknown:
            raise ValueError(f"visuals are pictures or paths, not {unknown}")
        content: list[dict[str, str]] = []
        images: list[Any] = []
        clips: list[_Clip] = []
        for visual in visuals:
            if isinstance(visual, picture):
                shown = [visual.convert("RGB")]
            elif self._reads_clips:
                clips.append(_Clip(visual, self.num_frames))
                content.append({"type": "video"})
                continue
            else:
                shown = list(read_frames(visual, count=self.num_frames).pixels)
            images += shown
            content += [{"type": "image"}] * len(shown)
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True)
        given: dict[str, Any] = {"images": images} if images else {}
        if clips:
            # The frames are chosen already; without their times, processors take them for 24 a second and choose again.
            given["videos"] = [clip.pixels for clip in clips]
            given["videos_kwargs"] = {"video_metadata": [clip.metadata for clip in clips], "do_sample_frames": False}
        inputs = self.processor(text=[prompt], return_tensors="pt", **given).to(self.model.device)
        for name, value in inputs.items():
            if torch.is_floating_point(value):
                inputs[name] = value.to(self.model.dtype)
        # Only a rate asks for durations, and a family whose items are frames has more items than clips.
        rated = not images and TokenBudget.parse(self.budget).tokens_per_second is not None
        seconds = [clip.seconds for clip in clips] if rated else None
        reduced = self.reducer is not None and visuals
        with attach(self.model, self.reducer, self.budget, seconds=seconds) if reduced else nullcontext() as handle:
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        usage = tuple(handle.usage) if handle is not None else ()
        native = inputs["input_ids"].shape[1]
        written = out[0, native:]
        text = self.processor.decode(written, skip_special_tokens=True)
        for end in filter(None, stop):
            text = text.partition(end)[0]
        saved = sum(item.native - item.used for item in usage)
        return Reduced(text.strip(), native - saved, len(written), usage)
