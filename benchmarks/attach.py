"""What a reduction buys and where it buys nothing: seconds and peak memory of encoder, prefill and decoding.

    python benchmarks/attach.py --model llava-onevision-0.5b --depth 0.125 --frames 4

Layers have the widths of the published models and random weights; `--depth` keeps that share of the layers of encoder
and language model alike, so that their proportion stays while the whole fits the machine. Every row is one clip of the
same pixels: native, then 50, 25 and 10 % of the tokens, behind the encoder, inside it (ToMe), and before it (static
patches are dropped). On a processor seconds are those of the process (one thread), on a GPU those of the clock; memory
is the peak above what was held before (on a processor a lower bound: what earlier rows freed is used again). All in one
run, the baseline first. The input is synthetic: its size alone counts.

`--count` runs nothing and counts the operations of the models with all their layers instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenthrift.attachment import attach
from tokenthrift.reducers import BipartiteMerging, TemporalMerging

QWEN_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [0, 7, 15, 23, 31],
}
# Layers of encoder and language model; width, feed-forward, heads and key-value heads of the language model.
SIZES: dict[str, tuple[int, int, tuple[int, int, int, int]]] = {
    "llava-onevision-0.5b": (27, 24, (896, 4864, 14, 2)),
    "llava-onevision-7b": (27, 28, (3584, 18944, 28, 4)),
    "qwen2.5-vl-3b": (32, 36, (2048, 11008, 16, 2)),
    "qwen2.5-vl-7b": (32, 28, (3584, 18944, 28, 4)),
}


def build(name: str, depth: float) -> Any:
    """The model in evaluation mode, with a small vocabulary: its head is no part of the question."""
    encoder, layers, (hidden, intermediate, heads, key_value_heads) = SIZES[name]
    count = max(round(encoder * depth), 2)
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": max(round(layers * depth), 1),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 512,
    }
    tokens = {"image_token_id": 3, "video_token_id": 4}
    config: Any
    if name.startswith("llava"):
        vision = transformers.SiglipVisionConfig(**SIGLIP, num_hidden_layers=count, vision_use_head=False)
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**text), **tokens
        )
    else:
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": QWEN_ROPE},
            vision_config={**QWEN_VISION, "depth": count, "out_hidden_size": hidden},
            vision_start_token_id=1,
            vision_end_token_id=2,
            **tokens,
        )
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config).eval()


def prompt(name: str, frames: int) -> dict[str, torch.Tensor]:
    """A clip and 32 tokens of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, 500, (16,), generator=generator)
    if name.startswith("llava"):
        pixels = torch.randn(1, frames, 3, 384, 384, generator=generator)
        slots, more = frames * 14 * 14 + 1, {"pixel_values_videos": pixels}
    else:
        grid = (max(frames // 2, 1), 28, 28)
        pixels = torch.randn(grid[0] * 28 * 28, 3 * 2 * 14 * 14, generator=generator)
        slots, more = grid[0] * 14 * 14, {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
    ids = torch.cat([text, torch.tensor([1]), torch.full((slots,), 4), torch.tensor([2]), text])[None]
    if not name.startswith("llava"):
        more["mm_token_type_ids"] = 2 * (ids == 4).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def now(device: torch.device) -> float:
    """Seconds, of the clock on a GPU and of the process elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that gives the most MiB used within the context above what was used at its beginning."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - start) / 2**20
    else:
        reset.write_text("5")
        start_mib = resident("VmRSS")
        yield lambda: resident("VmHWM") - start_mib


@torch.inference_mode()
def measure(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> tuple[float, float, float, float]:
    """Seconds of encoder, prefill and decoding, and peak MiB."""
    spent = [0.0]
    name = "get_video_features"
    encode, own = getattr(model.model, name), vars(model.model).get(name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now(model.device)
        output = encode(*args, **kwargs)
        spent[0] += now(model.device) - start
        return output

    setattr(model.model, name, timed)
    try:
        with peak(model.device) as most:
            start = now(model.device)
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            prefill = now(model.device) - start - spent[0]
            mask, start = inputs["attention_mask"], now(model.device)
            for _ in range(steps):
                mask = torch.cat([mask, mask[:, :1]], dim=1)
                ids = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            decoding = now(model.device) - start
            return spent[0], prefill, decoding, most()
    finally:
        delattr(model.model, name)
        if own is not None:
            setattr(model.model, name, own)


def _encoder_cost(rows: int, patches: int, width: int, block: float, part: float) -> float:
    n = part * patches
    return 2e-12 * rows * n * (block + 2 * n * width)


def _language_cost(layers: int, tokens: int, hidden: int, layer: float, steps: int, part: float) -> tuple[float, float]:
    n = part * tokens + 34
    return 2e-12 * layers * n * (layer + n * hidden), 2e-12 * layers * steps * (layer + 2 * n * hidden)


def count(frames: int, steps: int) -> None:
    """Prints tera-operations of encoder, prefill and decoding by arithmetic; norms, heads and reducers are left out."""
    print("| model | tokens | encoder | prefill | decoding | all, behind | between layers | before |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, (depth, layers, (hidden, wide, heads, shared)) in SIZES.items():
        siglip = name.startswith("llava")
        width, inner = (1152, 4304) if siglip else (1280, 3420)
        rows, patches, tokens = (frames, 729, 196) if siglip else (max(frames // 2, 1), 784, 196)
        block = 4 * width * width + (2 if siglip else 3) * width * inner
        layer = 2 * hidden * hidden * (1 + shared / heads) + 3 * hidden * wide

        encoder = partial(_encoder_cost, depth * rows, patches, width, block)
        language = partial(_language_cost, layers, rows * tokens, hidden, layer, steps)
        native = encoder(1.0) + sum(language(1.0))
        for part in (1.0, 0.5, 0.25, 0.1):
            between = sum(encoder(1 - (1 - part) * (i + 1) / depth) for i in range(depth)) / depth
            rest = sum(language(part))
            shares = [(cost + rest) / native for cost in (encoder(1.0), between, encoder(part))]
            costs = [encoder(1.0), *language(part)]
            cells = [f"{value:.2f}" for value in (*costs, *shares)]
            print(f"| {name} | {part:.0%} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="llava-onevision-0.5b", help="whose layer sizes")
    parser.add_argument("--depth", type=float, default=0.125, help="share of the layers, above 0 and at most 1")
    parser.add_argument("--frames", type=int, default=4, help="frames of the clip")
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--count", action="store_true", help="count operations by arithmetic and run nothing")
    options = parser.parse_args()
    if options.count:
        count(options.frames, options.steps)
        return
    model = build(options.model, options.depth).to(options.device)
    inputs = {name: value.to(options.device) for name, value in prompt(options.model, options.frames).items()}
    measure(model, inputs, 1)  # allocators and kernels warm up
    print(f"{options.model}, {options.depth:g} of its layers, {options.frames} frames, {options.steps} tokens decoded")
    print("| tokens | where | used | encoder s | prefill s | decoding s | all s | of native | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    baseline = 0.0
    rows: list[tuple[str, str, Any, str]] = [("100%", "native", None, "embeddings")]
    for share in ("50%", "25%", "10%"):
        rows.append((share, "behind the encoder (merging)", BipartiteMerging(), "embeddings"))
        rows.append((share, "between its layers (ToMe)", BipartiteMerging(), "encoder"))
        rows.append((share, "before it (static patches, EVS)", TemporalMerging(), "encoder"))
    for share, where, reducer, at in rows:
        context: Any = nullcontext() if reducer is None else attach(model, reducer, share, at=at)  # type: ignore[arg-type]
        with context as handle:
            encoder, prefill, decoding, memory = measure(model, inputs, options.steps)
        total = encoder + prefill + decoding
        baseline = baseline or total
        used = int((inputs["input_ids"] == 4).sum()) if handle is None else handle.usage[0].used
        print(
            f"| {share} | {where} | {used} | {encoder:.2f} | {prefill:.2f} | {decoding:.2f} | {total:.2f} "
            f"| {total / baseline:.2f} | {memory:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
