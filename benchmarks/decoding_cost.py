"""What a denoising or verifying pass costs against left-to-right steps: `python benchmarks/decoding_cost.py`.

One pass of a language model over a response of L slots, after a prefix whose keys and values are cached, is timed
against L left-to-right steps with a cache, for models of published shapes with random weights. A pass reads every
weight once, and so does each step. The ratio of a whole decoding follows from the passes that were measured on real
speech: `L steps / (passes x one pass)`. On a CPU the seconds are those of the process, so that other work on the
machine does not count.

`--passes` is the mean number of language-model passes a recording, or a JSON file of `benchmarks/dllm_asr.py` whose row
`--system` on the set `--data` says it. The paper (dLLM-ASR, arXiv 2601.17902)
reports 4.44 times the speed of a left-to-right model at 8B.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.shape import BackboneShape

CLAIM: Final = 4.44


# Positions as many as a measurement needs; there is no MASK here, so any id serves.
_shape = partial(BackboneShape, max_position_embeddings=2048, mask_id=0, tie_word_embeddings=True)
SHAPES: Final = {
    "SmolLM2-135M": _shape(
        model_type="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
    ),
    "Qwen2.5-0.5B": _shape(
        model_type="qwen2",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
    ),
    "Qwen2.5-1.5B": _shape(
        model_type="qwen2",
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a model, medians over the repeats.

    Attributes:
        model: its name.
        dtype: precision of weights and computation.
        device: where it ran.
        prefix: cached positions before the response.
        slots: L.
        one_pass: over all slots at once.
        steps: L left-to-right steps with a cache.
        passes: of a recording.
        ratio: `steps / (passes * one_pass)`.
    """

    model: str
    dtype: str
    device: str
    prefix: int
    slots: int
    one_pass: float
    steps: float
    passes: float
    ratio: float


def model_of(shape: BackboneShape, dtype: torch.dtype, device: str) -> Any:
    """A causal model of a shape with small random weights."""
    with torch.device("meta"):
        model: Any = language_model(shape.for_transformers()).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.tie_weights()
    # The rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model


def prefilled(model: Any, prefix: int) -> DynamicCache:
    """Keys and values of a prefix."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(prefix, device=model.device)[None]
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def parallel(model: Any, cache: DynamicCache, slots: int) -> Tensor:
    """One pass over all slots after the prefix; each sees all others, as in a denoising round."""
    start = cache.get_seq_length()
    ids = torch.zeros(1, slots, dtype=torch.long, device=model.device)
    seen = torch.ones(1, 1, slots, start + slots, dtype=torch.bool, device=model.device)
    positions = start + torch.arange(slots, device=model.device)[None]
    logits: Tensor = model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
    ).logits
    cache.crop(start - cache.get_seq_length())  # counted from the end
    return logits.argmax(-1)


def left_to_right(model: Any, cache: DynamicCache, slots: int) -> Tensor:
    """So many steps after the prefix, each of the token before."""
    start = cache.get_seq_length()
    now = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for _ in range(slots):
        now = model(input_ids=now, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    cache.crop(start - cache.get_seq_length())  # counted from the end
    return now


def seconds(work: Callable[[], Tensor], repeats: int, device: str) -> float:
    """The median time of some work, after one warm-up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        started = clock()
        work().cpu()  # waits for a GPU
        times.append(clock() - started)
    return sorted(times[1:])[repeats // 2]


@torch.inference_mode()
def measure(
    name: str, *, slots: int, prefix: int, passes: float, dtype: torch.dtype, device: str, repeats: int
) -> Cost:
    """Both ways of decoding by one model."""
    model = model_of(SHAPES[name], dtype, device)
    cache = prefilled(model, prefix)
    one_pass = seconds(lambda: parallel(model, cache, slots), repeats, device)
    steps = seconds(lambda: left_to_right(model, cache, slots), repeats, device)
    return Cost(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        prefix=prefix,
        slots=slots,
        one_pass=one_pass,
        steps=steps,
        passes=passes,
        ratio=steps / (passes * one_pass),
    )


def passes_of(text: str, system: str, data: str) -> float:
    """A number, or that of a row in a JSON file of `benchmarks/dllm_asr.py`.

    Raises:
        ValueError: the file has no such row.
    """
    if not Path(text).is_file():
        return float(text)
    rows = json.loads(Path(text).read_text(encoding="utf-8"))
    for row in rows["systems"] if isinstance(rows, dict) else rows:
        if row["system"] == system and row["set"] == data:
            return float(row["forwards"])
    raise ValueError(f"{text} has no row of {system!r} on {data!r}")


def table(costs: list[Cost]) -> str:
    """Markdown."""
    lines = [
        "| model | precision | device | prefix | slots | one pass, s | left to right, s | passes | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in costs:
        lines.append(
            f"| {c.model} | {c.dtype} | {c.device} | {c.prefix} | {c.slots} | {c.one_pass:.3f} | {c.steps:.3f} | "
            f"{c.passes:.2f} | {c.ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="shapes (default: all)")
    parser.add_argument("--slots", type=int, default=32, help="tokens of a text")
    parser.add_argument("--prefix", type=int, default=125, help="cached positions: 10 s at 12.5 a second")
    parser.add_argument("--passes", default="3", help="passes of a recording, or a JSON file of benchmarks/dllm_asr.py")
    parser.add_argument("--system", default="diffusion, draft", help="its row in that file")
    parser.add_argument("--data", default="strangers", help="the set of that row")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the smallest model, once")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    names, repeats = (arguments.models[:1], 1) if arguments.quick else (arguments.models, arguments.repeats)
    try:
        passes = passes_of(arguments.passes, arguments.system, arguments.data)
    except ValueError as error:
        parser.error(str(error))
    if not 0 < passes < math.inf:
        parser.error(f"--passes: a recording takes more than {passes:g} passes of a language model")
    options: dict[str, Any] = {"slots": arguments.slots, "prefix": arguments.prefix, "passes": passes}
    options |= {"dtype": getattr(torch, arguments.dtype), "device": arguments.device, "repeats": repeats}
    costs = [measure(name, **options) for name in names]
    print(table(costs))
    for cost in costs:
        verdict = "at least" if cost.ratio >= CLAIM else "below"
        print(f"{cost.model}: {cost.ratio:.2f} times, {verdict} the paper's {CLAIM}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
