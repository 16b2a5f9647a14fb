"""What VQToken costs against its baselines, in one run: `python benchmarks/vqtoken.py --json out.json`.

Features are synthetic: patches around random directions that come and go over the clip, 16 frames of 27 x 27 patches,
896 wide, as LLaVA-OneVision 0.5B has them. Baselines are written out below or in `tokenthrift.vqtoken.released` as the
published code does it; all cluster the same features, with the same threads. Times are seconds of processor time, the
least of several runs, so that other work on the machine hardly counts. The published fixed mode stops at 50 iterations
as ours does at 20 over a sample and 20 over all tokens; each is run until its own rule says that it is done, and the
share of the scatter that its clusters leave unexplained is printed beside it.

The encoder is SigLIP so400m/14-384 without its last layer, as published, in float32 with random weights; one frame is
run and its time multiplied. The stream is an hour at one frame a second of 14 x 14 patches, synthesized chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken
from tokenthrift.vqtoken.clustering import Clusters, unit_tokens
from tokenthrift.vqtoken.released import fit_2026
from tokenthrift.vqtoken.streaming import Stream

WIDTH = 896


def features(frames: int, side: int, start: int = 0, clusters: int = 40) -> Tensor:
    """(frames, side, side, WIDTH): a scene of `clusters` directions, eight of them at a time, on 4 x 4 blocks."""
    generator = torch.Generator().manual_seed(start)
    directions = torch.randn(clusters, WIDTH, generator=torch.Generator().manual_seed(0))
    scene = (start + torch.arange(frames)) // 4 * 3
    blocks = torch.randint(0, 8, (frames, -(-side // 4), -(-side // 4)), generator=generator) + scene[:, None, None]
    which = (blocks % clusters).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :side, :side]
    return directions[which] + torch.randn(frames, side, side, WIDTH, generator=generator)


def plain_kmeans(tokens: Tensor, clusters: int, iterations: int = 50) -> tuple[Tensor, int]:
    """The fit of 2025: distances to all seeds for every new one, then a loop over clusters with masks.

    Returns:
        (N,) labels and the number of iterations.
    """
    x = tokens / tokens.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    centers = x[torch.randint(0, len(x), (1,), generator=generator)]
    for _ in range(clusters - 1):
        nearest = torch.cdist(x, centers).square().min(1).values + 1e-6
        centers = torch.cat([centers, x[torch.multinomial(nearest, 1, generator=generator)]])
    for done in range(1, iterations + 1):
        unit, towards = x / x.norm(dim=1, keepdim=True), centers / centers.norm(dim=1, keepdim=True)
        labels = (1 - unit @ towards.T).argmin(1)
        new = centers.clone()
        for k in range(clusters):
            members = labels == k
            if members.sum() > 0:
                new[k] = x[members].mean(0)
        moved = (new - centers).norm().item()
        centers = new
        if moved < 1e-4:
            return labels, done
    return labels, iterations


def unexplained(unit: Tensor, labels: Tensor) -> float:
    """Share of the scatter of (N, D) unit tokens that (N,) labels leave."""
    slots = int(labels.max()) + 1
    sums = unit.new_zeros(slots, unit.shape[1], dtype=torch.float64).index_add(0, labels, unit.double())
    return float(Clusters(labels[None], sums[None], torch.bincount(labels)[None]).error())


def seconds(work: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """The least processor time of several runs, and what the last one gave."""
    least = float("inf")
    for _ in range(runs):
        started = time.process_time()
        result = work()
        least = min(least, time.process_time() - started)
    return least, result


def encoder_seconds(layers: int) -> float:
    """Processor time of one frame through SigLIP so400m/14-384."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    model = model.to_empty(device="cpu").eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) if "position_ids" in name else buffer.zero_())
        pixels = torch.randn(1, 3, 384, 384)
        return seconds(lambda: model(pixels), 2)[0]


def resident() -> float:
    """Megabytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def stream_hour(frames: int, chunk: int) -> list[dict[str, Any]]:
    """Memory and time along a stream."""
    stream, rows, work = Stream(96), [], 0.0
    marks = {frames // 20, frames // 4, frames // 2, frames}
    for start in range(0, frames, chunk):
        part = features(min(chunk, frames - start), 14, start)
        started = time.process_time()
        stream.push(part)
        work += time.process_time() - started
        if {m for m in marks if start < m <= start + chunk}:
            usage = stream.finish(32).tokens.usage[0]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # in KiB
            rows.append(
                {
                    "frames": stream.frames,
                    "tokens_in": usage.native,
                    "error": usage.error,
                    "seconds": work,
                    "resident_mb": resident(),
                    "peak_mb": peak,
                }
            )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """One table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            *(
                f"{v:.3g}" if isinstance(v, float) and v < 100 else f"{v}" if isinstance(v, int | str) else f"{v:.0f}"
                for v in row.values()
            )
        )
    Console(width=120).print(table)


def main() -> None:
    """Runs everything and prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, help="of each clustering; the least counts (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=16, help="of the clip (default: %(default)s)")
    parser.add_argument("--stream", type=int, default=3600, help="frames of the stream (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=26, help="of the encoder; 0 leaves it out (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    stream = stream_hour(arguments.stream, 16) if arguments.stream else []
    if stream:
        show(f"Stream in chunks of 16 frames of 14 x 14 patches, {WIDTH} wide (synthetic)", stream)
    clip = features(arguments.frames, 27)
    tokens = clip.flatten(0, 2)
    unit = unit_tokens(tokens[None], None)[0][0]
    batch, model = TokenBatch.from_items([tokens], grids=[(arguments.frames, 27, 27)]), VQToken()

    def ours(budget: str) -> Callable[[], tuple[Tensor, int]]:
        def work() -> tuple[Tensor, int]:
            done = model.compress(batch, budget)
            return done.maps[0].flatten(), done.tokens.usage[0].used

        return work

    def lean() -> tuple[Tensor, int]:
        fit = fit_2026(tokens, 32, 0)
        return fit.labels, fit.iterations

    plain, (plain_labels, plain_steps) = seconds(lambda: plain_kmeans(tokens, 32), arguments.runs)
    rows = []
    methods: list[tuple[str, Callable[[], tuple[Tensor, int]]]] = [
        ("published rules of 2026, K = 32", lean),
        ("VQToken, K = 32", ours("32")),
        ("VQToken, K = 1..32 by error 0.6", ours("32,e0.6")),
        ("VQToken, K = 1..32 by error 0.7", ours("32,e0.7")),
    ]
    rows.append(
        {
            "method": f"plain loop over clusters, K = 32 ({plain_steps} iterations)",
            "K": 32,
            "seconds": plain,
            "labels": plain_labels,
        }
    )
    for name, work in methods:
        spent, (labels, _) = seconds(work, arguments.runs)
        rows.append({"method": name, "K": int(labels.max()) + 1, "seconds": spent, "labels": labels})
    fixed = rows[2]["seconds"]
    for row in rows:
        row |= {
            "x faster than plain": plain / row["seconds"],
            "/ fixed K": row["seconds"] / fixed,
            "unexplained": unexplained(unit, row.pop("labels")),
        }
    show(
        f"Clustering {arguments.frames} frames x 729 patches x {WIDTH} (synthetic), {arguments.threads} thread(s)", rows
    )
    encoder = encoder_seconds(arguments.layers) * arguments.frames if arguments.layers else None
    if encoder is not None:
        print(
            f"SigLIP so400m/14-384, {arguments.layers} layers, float32: {encoder:.1f} s for {arguments.frames} frames "
            f"(one frame, multiplied); VQToken at K = 32 takes {100 * fixed / encoder:.2f} % of that"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"clustering": rows, "encoder": encoder, "stream": stream}, indent=2))


if __name__ == "__main__":
    main()
