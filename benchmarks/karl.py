"""What KARL's saved tokens save in time, in one run: `python benchmarks/karl.py --json out.json`.

The model has the published size (`karl_small` on MaskGIT's VQGAN, 256 pixels) and random weights, which cost what
trained ones do. Three questions: how much faster the latent decoder is when it computes the kept tokens only, against
the same weights over all 512 positions behind the published mask (the outputs are checked to agree); what that is worth
in the whole pipeline, part by part; and one pass against a search for the smallest count by bisection, whose eight
steps encode and decode each, as the search that KARL replaces does, or only decode, which nested tokens allow. Both end
at the same tokens of the same images, hence at the same error.

Rivals take turns in one thread. Figures are medians of processor time, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenthrift.karl.config import ERROR_BINS, named
from tokenthrift.karl.latent import LatentDecoder
from tokenthrift.karl.model import Karl

KEPT = (32, 128, 225)
STEPS = 8
BARS = {32: 1.6, 128: 1.25, 225: 1.0}


def all_positions(decoder: LatentDecoder, values: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """The decoder as published: every position is computed, and dropped tokens are masked.

    Args:
        decoder: the weights.
        values: `(B, 256, token_width)`.
        keep: `(B, 256)` bool.
        grid: rows and columns.
    """
    tokens = decoder.embed(values) + decoder.places[: values.shape[1]]
    cells = (decoder.cell + decoder.positions.flatten(1).T).expand(len(values), -1, -1)
    count = cells.shape[1]
    live = F.pad(keep, (count, 0), value=True)
    itself = torch.eye(live.shape[1], dtype=torch.bool, device=live.device)
    mask = (live[:, :, None] & live[:, None]) | itself
    x = decoder.transformer(torch.cat([cells, tokens], 1), mask[:, None])[:, :count]
    out: Tensor = decoder.head(decoder.norm_out(x))
    return out


def medians(ways: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """Seconds of processor time that each way takes, taking turns."""
    found: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            begun = time.process_time()
            run()
            found[way].append(time.process_time() - begun)
    return {way: statistics.median(values) for way, values in found.items()}


def decoders(karl: Karl, tokens: Tensor, repeats: int) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds over the kept tokens and over all positions, by the number of kept tokens."""
    grid = karl.config.grid
    ways: dict[Any, Callable[[], object]] = {}
    for kept in KEPT:
        keep = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        keep[:, :kept] = True
        mine, theirs = karl.expand(tokens, keep, grid), all_positions(karl.decoder, tokens, keep, grid)
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
        ways[kept, "kept"] = partial(karl.expand, tokens, keep, grid)
        ways[kept, "all"] = partial(all_positions, karl.decoder, tokens, keep, grid)
    seconds = medians(ways, repeats)
    return {k: seconds[k, "kept"] for k in KEPT}, {k: seconds[k, "all"] for k in KEPT}


def pipeline(karl: Karl, images: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of the parts that do not depend on the count."""
    features = karl.base.encode(images)
    counts = torch.full((len(images),), karl.config.max_tokens)
    errors = torch.full((len(images),), ERROR_BINS[0])
    return medians(
        {
            "base encoder": lambda: karl.base.encode(images),
            "latent encoder": lambda: karl.distil(images, features, counts, errors),
            "base decoder": lambda: karl.base.decode(features),
        },
        repeats,
    )


def searches(karl: Karl, images: Tensor, kept: int, repeats: int) -> dict[str, float]:
    """Seconds of one pass and of bisection that ends at the same count."""
    size, most = len(images), karl.config.max_tokens
    errors = torch.full((size,), ERROR_BINS[0])

    def encode(features: Tensor, count: int) -> Tensor:
        found = karl.distil(images, features, torch.full((size,), count), errors)
        return karl.quantise(found.tokens, found.mask).values

    def decode(values: Tensor, count: int) -> float:
        keep = (torch.arange(values.shape[1]) < count).expand(size, -1)
        made = karl.base.decode(karl.features_of(karl.expand(values, keep)))
        return float((made - images).abs().mean())

    def one_pass() -> float:
        return decode(encode(karl.base.encode(images), most), kept)

    def search(nested: bool) -> Callable[[], float]:
        def run() -> float:
            features = karl.base.encode(images)
            whole = encode(features, most) if nested else None
            low, high, error = 0, most, float("nan")
            for _ in range(STEPS):
                middle = (low + high) // 2
                error = decode(encode(features, middle) if whole is None else whole, middle)
                # Random weights have no error to search for; the steps are those that lead to the wanted count.
                low, high = (low, middle) if middle >= kept else (middle, high)
            return error

        return run

    ways: dict[str, Callable[[], object]] = {"one pass": one_pass, "search, encoder and decoder": search(False)}
    return medians({**ways, "search, nested tokens": search(True)}, repeats)


@torch.inference_mode()
def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="karl_small", help="named size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that are counted (default: %(default)s)")
    parser.add_argument("--searches", type=int, default=1, help="rounds of the search (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    karl = Karl(named(options.size)).eval()
    images = torch.rand(options.batch, 3, *karl.config.size)
    tokens = F.normalize(torch.randn(options.batch, karl.config.max_tokens, karl.config.token_width), dim=-1)

    console = Console(width=110)
    setting = f"{options.size}, random weights, CPU, one thread, batch {options.batch}, float32"
    searches(karl, images[:1], 128, 1)  # warm-up
    mine, theirs = decoders(karl, tokens, options.repeats)
    table = Table(
        "kept of 256", "kept only, s", "all 512 positions, s", "ratio", "bar", title=f"Latent decoder: {setting}"
    )
    for kept in KEPT:
        ratio = theirs[kept] / mine[kept]
        table.add_row(str(kept), f"{mine[kept]:.2f}", f"{theirs[kept]:.2f}", f"{ratio:.2f}x", f">= {BARS[kept]:g}x")
    console.print(table)

    parts = pipeline(karl, images, options.repeats)
    table = Table(
        "kept of 256", *parts, "latent decoder", "sum, s", "published, s", "ratio", title="Whole pipeline, seconds"
    )
    for kept in KEPT:
        whole, published = sum(parts.values()) + mine[kept], sum(parts.values()) + theirs[kept]
        figures = [f"{value:.2f}" for value in (*parts.values(), mine[kept], whole, published)]
        table.add_row(str(kept), *figures, f"{published / whole:.2f}x")
    console.print(table)

    found = searches(karl, images, 128, options.searches)
    table = Table("way", "seconds", "of one pass", title=f"Finding 128 tokens: one pass or {STEPS} steps; bar >= 5x")
    for way, seconds in found.items():
        table.add_row(way, f"{seconds:.2f}", f"{seconds / found['one pass']:.2f}x")
    console.print(table)
    if options.json is not None:
        figures_out = {"setting": setting, "kept": mine, "all": theirs, "parts": parts, "search": found}
        options.json.write_text(json.dumps(figures_out, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
