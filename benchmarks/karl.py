"""What KARL's saved tokens save in time, in one run: `python benchmarks/karl.py --json out.json`.

The model has the published size (`karl_small` on MaskGIT's VQGAN, 256 pixels) and random weights, which cost what
trained ones do. Three questions. How much faster is the latent decoder when it computes the kept tokens only, against
the same weights over all 512 positions behind the published mask (the outputs are checked to agree)? What is that worth
in the whole pipeline, from pixels to pixels, timed end to end with its parts beside it? And what does one pass save
against a search by bisection for the smallest count, whose eight steps encode and decode each, as the search that KARL
replaces does, or only decode, which nested tokens allow? Every search has to end at the error of the one pass, which is
checked.

All ways take turns in one thread. Figures are medians of processor time, which other work on the machine hardly
changes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokenthrift.karl.config import ERROR_BINS, named
from tokenthrift.karl.latent.autoencoder import LatentDecoder
from tokenthrift.karl.model import Karl

KEPT = (32, 128, 225)
WHOLE = (32, 128)  # of the pipelines, which take a minute each
STEPS = 8
THRESHOLDS = {32: 1.6, 128: 1.25, 225: 1.0}
PUBLISHED = "all"
PARTS = ("base encoder", "latent encoder", "latent decoder", "base decoder")
WAYS = ("one pass", "search, encoder and decoder", "search, decoder only")
SEARCH_THRESHOLD = 5.0
SAME_ERROR = 1e-5


def all_positions(decoder: LatentDecoder, values: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """The decoder as published: every position is computed, and dropped tokens are masked.

    Args:
        decoder: the weights.
        values: `(B, 256, token_dim)`.
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


def first(values: Tensor, kept: int) -> Tensor:
    """Keeps the first tokens of `values` `(B, T, token_dim)`: `(B, T)` bool."""
    return (torch.arange(values.shape[1]) < kept).expand(len(values), -1)


def medians(ways: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, float]:
    """Seconds of processor time that each way takes, taking turns."""
    found: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            begun = time.process_time()
            run()
            found[way].append(time.process_time() - begun)
    return {way: statistics.median(values) for way, values in found.items()}


def decoders(karl: Karl, tokens: Tensor, repeats: int) -> dict[Any, float]:
    """Seconds over the kept tokens, by their number, and over all positions, which cost the same whatever is masked."""
    grid, one = karl.config.grid, tokens[:1]
    for kept in KEPT:
        mine, theirs = (
            karl.decode_latents(one, first(one, kept), grid),
            all_positions(karl.decoder, one, first(one, kept), grid),
        )
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    ways: dict[Any, Callable[[], object]] = {
        k: partial(karl.decode_latents, tokens, first(tokens, k), grid) for k in KEPT
    }
    ways[PUBLISHED] = partial(all_positions, karl.decoder, tokens, first(tokens, KEPT[-1]), grid)
    return medians(ways, repeats)


def pipelines(karl: Karl, images: Tensor, ways: Sequence[Any], repeats: int) -> dict[Any, dict[str, float]]:
    """Seconds from pixels to pixels, and of each part of the same runs, by the tokens kept or as published."""
    grid = karl.config.grid
    counts = torch.full((len(images),), karl.config.max_tokens)
    errors = torch.full((len(images),), ERROR_BINS[0])

    def run(way: Any) -> list[float]:
        marks = [time.process_time()]
        features = karl.base.encode(images)
        marks.append(time.process_time())
        found = karl.encode_latents(images, features, counts, errors)
        values = karl.quantize(found.tokens, found.mask).values
        marks.append(time.process_time())
        if way == PUBLISHED:
            output = all_positions(karl.decoder, values, first(values, KEPT[-1]), grid)
        else:
            output = karl.decode_latents(values, first(values, way), grid)
        marks.append(time.process_time())
        karl.base.decode(karl.to_features(output, grid))
        marks.append(time.process_time())
        return marks

    runs: dict[Any, list[list[float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, seen in runs.items():
            seen.append(run(way))
    found = {}
    for way, seen in runs.items():
        found[way] = {
            part: statistics.median(marks[i + 1] - marks[i] for marks in seen) for i, part in enumerate(PARTS)
        }
        found[way]["end to end"] = statistics.median(marks[-1] - marks[0] for marks in seen)
    return found


def searches(karl: Karl, images: Tensor, kept: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of one pass and of bisection, and the errors that they end at, which are the same.

    Raises:
        AssertionError: a search ends at another error than one pass.
    """
    most = karl.config.max_tokens
    errors = torch.full((len(images),), ERROR_BINS[0])
    ends: dict[str, float] = {}

    def encode(features: Tensor, count: int) -> Tensor:
        found = karl.encode_latents(images, features, torch.full((len(images),), count), errors)
        return karl.quantize(found.tokens, found.mask).values

    def decode(values: Tensor, count: int) -> float:
        made = karl.base.decode(karl.to_features(karl.decode_latents(values, first(values, count))))
        return float((made - images).abs().mean())

    def one_pass() -> None:
        ends[WAYS[0]] = decode(encode(karl.base.encode(images), most), kept)

    def search(way: str, nested: bool) -> None:
        features = karl.base.encode(images)
        whole = encode(features, most) if nested else None
        low, high = 0, most
        for _ in range(STEPS):
            middle = (low + high) // 2
            error = decode(encode(features, middle) if whole is None else whole, middle)
            # With random weights errors do not fall with the count; the steps are those that lead to the given count.
            if middle >= kept:
                high, ends[way] = middle, error
            else:
                low = middle
        assert high == kept, f"the search ended at {high} tokens"

    seconds = medians(
        {WAYS[0]: one_pass, WAYS[1]: partial(search, WAYS[1], False), WAYS[2]: partial(search, WAYS[2], True)}, repeats
    )
    for way in WAYS:
        assert abs(ends[way] - ends[WAYS[0]]) <= SAME_ERROR, f"{way}: error {ends[way]}, one pass {ends[WAYS[0]]}"
    return seconds, ends


@torch.inference_mode()
def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="karl_small", help="named size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="of the decoders (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of pipelines and searches (default: %(default)s)")
    parser.add_argument("--searched", type=int, default=1, help="images that are searched (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    karl = Karl(named(options.size))
    images = torch.rand(options.batch, 3, *karl.config.size)
    tokens = F.normalize(torch.randn(options.batch, karl.config.max_tokens, karl.config.token_dim), dim=-1)

    console = Console(width=110)
    setting = f"{options.size}, random weights, CPU, one thread, batch {options.batch}, float32"
    pipelines(karl, images[:1], KEPT[:1], 1)  # warm-up
    alone = decoders(karl, tokens, options.repeats)
    table = Table(
        "kept of 256", "kept only, s", "all 512 positions, s", "ratio", "threshold", title=f"Latent decoder: {setting}"
    )
    for kept in KEPT:
        ratio = alone[PUBLISHED] / alone[kept]
        threshold = f">= {THRESHOLDS[kept]:g}x"
        table.add_row(str(kept), f"{alone[kept]:.2f}", f"{alone[PUBLISHED]:.2f}", f"{ratio:.2f}x", threshold)
    console.print(table)

    whole = pipelines(karl, images, (*WHOLE, PUBLISHED), options.rounds)
    table = Table("kept of 256", *PARTS, "end to end", "ratio", title="Whole pipeline, pixels to pixels, seconds")
    for way, parts in whole.items():
        name = "all 512 positions, as published" if way == PUBLISHED else str(way)
        ratio = whole[PUBLISHED]["end to end"] / parts["end to end"]
        table.add_row(name, *(f"{seconds:.2f}" for seconds in parts.values()), f"{ratio:.2f}x")
    console.print(table)

    seconds, errors = searches(karl, images[: options.searched], 128, options.rounds)
    table = Table(
        "way",
        "seconds",
        "error at the end",
        "of one pass",
        "threshold",
        title=f"One pass against an {STEPS}-step search at equal error, 128 tokens, batch {options.searched}",
    )
    for way in WAYS:
        threshold = f">= {SEARCH_THRESHOLD:g}x" if way == WAYS[1] else ""
        ratio = seconds[way] / seconds[WAYS[0]]
        table.add_row(way, f"{seconds[way]:.2f}", f"{errors[way]:.6f}", f"{ratio:.2f}x", threshold)
    console.print(table)
    if options.json is not None:
        figures = {"setting": setting, "decoder": alone, "pipeline": whole, "search": seconds, "errors": errors}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
