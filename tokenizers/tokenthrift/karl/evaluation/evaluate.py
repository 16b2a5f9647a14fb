"""`tokenthrift evaluate karl`: is a KARL model worth its adaptivity, and does it keep its promises?

The published evaluation (arXiv 2507.07995) compares models with each other at a few counts; its code does not run. Here
a model is compared with itself: the same decoder with one fixed count for all images, at exactly the same mean number
of tokens, and a search that knows the answer, the smallest count of each image that meets the error. Misses are
counted over all images, also those that took every token. Whatever is chosen (the calibrated request) is chosen on
`--dev`; every figure is of `--data`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.evaluation.report import Cell, Table, write_report
from tokenthrift.evaluation.statistics import bootstrap_interval
from tokenthrift.karl import plots
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.calibration import Calibration
from tokenthrift.karl.evaluation.image_sets import named_source, read_set
from tokenthrift.karl.evaluation.metrics import METRICS, perceptual, spearman
from tokenthrift.karl.evaluation.study import complexity_table, families, studied
from tokenthrift.karl.evaluation.sweeps import LADDER, Prepared, at_counts, at_errors, calibrate, fewest, prepare, sweep
from tokenthrift.karl.model import Karl
from tokenthrift.karl.verified import encoder_passes

__all__ = ["Quality", "main", "quality"]

Coder = Callable[[Prepared], tuple[Tensor, Tensor]]
"""Images to tokens used `(B,)` and reconstructions `(B, 3, H, W)`."""
TIMED_BATCH = 8


@dataclass(frozen=True, slots=True)
class Quality:
    """One way of coding a set of images; a figure for each image."""

    tokens: Tensor
    metrics: dict[str, Tensor]

    @property
    def error(self) -> Tensor:
        """L1, `(N,)`."""
        return self.metrics["L1"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after `evaluate karl`; those of the process if None.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    torch.manual_seed(arguments.seed)
    karl = Karl.from_pretrained(arguments.model, device=arguments.device)
    height, width = karl.config.size
    if height != width:
        raise ValueError(f"evaluation reads square images; this model is trained on {height} x {width} pixels")
    test, dev = _sets(arguments, height)
    with torch.inference_mode():
        _report(karl, test, dev, arguments, argv)
    print(arguments.out / "report.md")
    return 0


def quality(karl: Karl, images: Tensor, coder: Coder, extra: Mapping[str, Any], batch: int = 64) -> Quality:
    """Codes images and measures what comes out.

    Args:
        karl: the model.
        images: `(N, 3, H, W)` uint8.
        coder: tokens and reconstructions of a batch; called in order.
        extra: further metrics by name, beside `METRICS`.
        batch: images at once.
    """
    tokens: list[Tensor] = []
    found: dict[str, list[Tensor]] = {}
    for items in prepare(karl, images, batch):
        used, made = coder(items)
        tokens.append(used.cpu())
        for name, metric in {**METRICS, **extra}.items():
            found.setdefault(name, []).append(metric(made, items.images).cpu())
    return Quality(torch.cat(tokens), {name: torch.cat(parts) for name, parts in found.items()})


def fixed(karl: Karl, counts: Tensor) -> Coder:
    """Codes with given counts `(N,)`, one for each image of the set, in order."""
    rows = iter(counts.tolist())

    def code(items: Prepared) -> tuple[Tensor, Tensor]:
        part = torch.tensor([next(rows) for _ in items.images], device=items.images.device)
        return part, next(at_counts(karl, items, [part]))

    return code


def verified(karl: Karl, error: float, rounds: list[int]) -> Coder:
    """Codes with a check and repair of misses; appends the decoder passes of each image to `rounds`."""

    def code(items: Prepared) -> tuple[Tensor, Tensor]:
        budgets = [TokenBudget(target_error=error)] * len(items.images)
        tokens = karl.encode(items.images, budgets, verify=True)
        rounds.extend(usage.rounds for usage in tokens.usage)
        return tokens.mask.sum(1), karl.decode(tokens)

    return code


def equal_mean(mean: float, size: int, native: int) -> Tensor:
    """Counts `(size,)` that are all `floor(mean)` or one more, with the mean that is wanted, to within one token."""
    total = min(round(mean * size), native * size)
    counts = torch.full((size,), total // size)
    # Spread over the set, so that the extra tokens favour no part of it.
    counts[torch.arange(total % size) * size // max(1, total % size)] += 1
    return counts


def _report(
    karl: Karl, test: dict[str, Tensor], dev: dict[str, Tensor], arguments: argparse.Namespace, argv: Sequence[str]
) -> None:
    native, wanted, alpha, batch = karl.config.max_tokens, arguments.error, arguments.alpha, arguments.batch_size
    images = torch.cat(list(test.values()))
    grid = list(range(0, native + 1, max(1, native // 32)))[1:]
    log = partial(print, file=sys.stderr, flush=True)
    log(f"calibrating on {sum(map(len, dev.values()))} images")
    calibration = calibrate(karl, torch.cat(list(dev.values())), alpha, (wanted,), batch)
    log(f"sweeping {len(images)} images over {len(LADDER)} errors and {len(grid)} counts")
    used, reached, at_grid = sweep(karl, images, errors=LADDER, counts=grid, batch=batch)

    name, distance = perceptual()
    measured = partial(quality, karl, images, extra={name: distance}, batch=batch)
    log("measuring")
    one_pass = measured(partial(at_errors, karl, error=wanted))
    rounds: list[int] = []
    checked = measured(verified(karl, wanted, rounds))
    encoded = [encoder_passes(passes, karl.support.nested) for passes in rounds]
    oracle = fewest(at_grid, grid, wanted)
    mean = one_pass.tokens.double().mean().item()
    ways = {
        "one pass": (one_pass, 1, 1.0),
        "one pass, verified": (checked, sum(encoded) / len(encoded), sum(rounds) / len(rounds)),
        "fixed count, same mean": (measured(fixed(karl, equal_mean(mean, len(images), native))), 1, 1.0),
        "all tokens": (measured(fixed(karl, torch.full((len(images),), native))), 1, 1.0),
        "search oracle": (measured(fixed(karl, oracle)), None, None),
    }
    refused = ""
    try:
        request = calibration.request(wanted)
        promised = measured(partial(at_errors, karl, error=request))
        ways["one pass, calibrated"] = (promised, 1, 1.0)
    except BudgetError as error:
        request, promised, refused = None, None, str(error)
        log(f"no calibrated request: {error}")
    times = _times(karl, images, wanted)
    tables = [
        _ways_table(karl, ways, times, wanted),
        _equal_table(karl, images, used, reached, batch),
        _sets_table(test, one_pass, ways["fixed count, same mean"][0], oracle, wanted),
        _promises_table(calibration, request, promised, one_pass, wanted),
        _bars_table(one_pass, ways["fixed count, same mean"][0], oracle, promised, wanted, alpha, native, refused),
    ]
    log("complexity")
    shown = families(karl, test, arguments.seed)
    study = {family: studied(karl, pictures, wanted, native) for family, pictures in shown.items()}
    tables.append(complexity_table(study))
    figures = {
        "error_against_tokens": plots.error_against_tokens(used, reached, grid, at_grid, LADDER),
        "wanted_and_reached": plots.wanted_and_reached(LADDER, reached, alpha),
        "tokens_and_oracle": plots.tokens_and_oracle(one_pass.tokens, oracle, native),
        "tokens_against_complexity": plots.scatter({f: (s["bytes"], s["tokens"]) for f, s in study.items()}, native),
        "examples": plots.examples({f: s["examples"] for f, s in study.items()}),
    }
    write_report(
        arguments.out,
        title=f"KARL: {Path(arguments.model).name}",
        settings={
            "model": str(arguments.model),
            "test": "; ".join(f"{n}: {len(s)} images" for n, s in test.items()),
            "dev (calibration)": "; ".join(f"{n}: {len(s)} images" for n, s in dev.items()),
            "wanted error": wanted,
            "alpha": alpha,
            "native tokens": native,
            "seed": arguments.seed,
            "threads": torch.get_num_threads(),
            "command": "tokenthrift evaluate karl " + " ".join(argv),
        },
        tables=tables,
        figures=figures,
        notes=[
            f"Errors are mean absolute differences per pixel in [0, 1]. The perceptual column is {name}.",
            f"The oracle tries every {grid[0]} tokens. Misses are counted over all images.",
        ],
    )


def _ways_table(karl: Karl, ways: Mapping[str, Any], times: Mapping[str, float], wanted: float) -> Table:
    layout = None if karl.config.codebook_size is None else BitFormat.of(karl.config)
    rows: list[tuple[Cell, ...]] = []
    for way, (found, encoder, decoder) in ways.items():
        tokens = found.tokens.double()
        bits = None if layout is None else sum(map(layout.cost, found.tokens.tolist())) / len(tokens)
        figures = [values.double().mean().item() for values in found.metrics.values()]
        missed = (found.error > wanted).double().mean().item()
        counts = (tokens.mean().item(), tokens.quantile(0.95).item(), tokens.mean().item() / karl.config.max_tokens)
        rows.append((way, *counts, bits, *figures, missed, encoder, decoder, times.get(way)))
    metrics = tuple(next(iter(ways.values()))[0].metrics)
    columns = ("way", "tokens", "p95", "of native", "bits", *metrics, "missed", "encoder passes", "decoder passes")
    return Table(
        title=f"At a wanted error of {wanted:g}",
        columns=(*columns, "ms an image"),
        rows=tuple(rows),
        note=f"Bits: codes and length of an image. Time: encode and decode in batches of {TIMED_BATCH}.",
    )


def _equal_table(karl: Karl, images: Tensor, used: Tensor, reached: Tensor, batch: int) -> Table:
    """Adaptive against fixed, at several requests, each at exactly the same total of tokens."""
    chosen = [i for i, error in enumerate(LADDER) if 0.02 <= error <= 0.12][::2]
    rows: list[tuple[Cell, ...]] = []
    for i in chosen:
        mean = used[:, i].double().mean().item()
        same = quality(karl, images, fixed(karl, equal_mean(mean, len(images), karl.config.max_tokens)), {}, batch)
        gain, low, high = bootstrap_interval((same.error - reached[:, i]).tolist())
        rows.append((LADDER[i], mean, reached[:, i].mean().item(), same.error.mean().item(), gain, low, high))
    return Table(
        title="Adaptive against one count for all, at equal mean tokens",
        columns=("request", "tokens", "L1 adaptive", "L1 fixed", "fixed - adaptive", "95 % from", "to"),
        rows=tuple(rows),
        note="The interval is a bootstrap over images; above 0, adaptivity pays.",
    )


def _sets_table(sets: Mapping[str, Tensor], one: Quality, same: Quality, oracle: Tensor, wanted: float) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, part in _parts(sets):
        errors, tokens = one.error[part], one.tokens[part]
        rows.append(
            (
                name,
                len(errors),
                tokens.double().mean().item(),
                oracle[part].double().mean().item(),
                errors.mean().item(),
                same.error[part].mean().item(),
                (errors > wanted).double().mean().item(),
                spearman(tokens, oracle[part]),
            )
        )
    columns = ("set", "images", "tokens", "oracle's", "L1", "L1 fixed, same mean overall", "missed", "Spearman")
    return Table(title=f"By set, at a wanted error of {wanted:g}", columns=columns, rows=tuple(rows))


def _promises_table(
    calibration: Calibration, request: float | None, promised: Quality | None, plain: Quality, wanted: float
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for way, asked, found in (("as asked", wanted, plain), ("calibrated", request, promised)):
        if found is None:
            continue
        missed = (found.error > wanted).double()
        share, low, high = bootstrap_interval(missed.tolist())
        over = (found.error[missed.bool()] - wanted).mean().item() if missed.any() else 0.0
        rows.append((way, asked, found.tokens.double().mean().item(), share, low, high, over))
    return Table(
        title=f"Misses of a wanted error of {wanted:g}",
        columns=("way", "request", "tokens", "missed", "95 % from", "to", "over by"),
        rows=tuple(rows),
        note=f"Calibrated on {calibration.images} other images so that at most {calibration.alpha:.0%} miss.",
    )


def _bars_table(
    one: Quality,
    same: Quality,
    oracle: Tensor,
    promised: Quality | None,
    wanted: float,
    alpha: float,
    native: int,
    refused: str = "",
) -> Table:
    tokens = one.tokens.double()
    gain = (same.error - one.error).mean().item()
    rank = spearman(one.tokens, oracle)
    rows: list[tuple[Cell, ...]] = [
        ("fixed minus adaptive L1 at equal mean tokens", gain, "> 0", gain > 0),
        ("Spearman of tokens and oracle's", rank, ">= 0.6", rank >= 0.6),
        ("mean tokens of native", tokens.mean().item() / native, "<= 0.6", tokens.mean().item() <= 0.6 * native),
    ]
    missed = None if promised is None else (promised.error > wanted).double().mean().item()
    kept = missed is not None and abs(missed - alpha) <= 0.02
    rows.append(("calibrated miss rate", missed, f"{alpha:g} +- 0.02", kept))
    note = f"No calibrated miss rate: {refused}." if refused else ""
    return Table(title="Bars", columns=("figure", "value", "bar", "kept"), rows=tuple(rows), note=note)


def _times(karl: Karl, images: Tensor, wanted: float, repeats: int = 5) -> dict[str, float]:
    """Milliseconds an image, median of some batches, each way in turn."""
    found: dict[str, list[float]] = {}
    budgets = [TokenBudget(target_error=wanted)] * TIMED_BATCH
    for start in range(0, TIMED_BATCH * repeats, TIMED_BATCH):
        part = images[start : start + TIMED_BATCH].to(karl.to_tokens.weight.device).float() / 255
        if len(part) < TIMED_BATCH:
            break
        ways: dict[str, Callable[[Tensor], object]] = {
            "one pass": lambda x: karl.decode(karl.encode(x, budgets)),
            "one pass, verified": lambda x: karl.decode(karl.encode(x, budgets, verify=True)),
            "all tokens": lambda x: karl.decode(karl.encode(x, TokenBudget())),
        }
        for way, run in ways.items():
            begun = time.perf_counter()
            run(part)
            if part.is_cuda:
                torch.cuda.synchronize()
            found.setdefault(way, []).append((time.perf_counter() - begun) * 1000 / TIMED_BATCH)
    return {way: sorted(values)[len(values) // 2] for way, values in found.items()}


def _parts(sets: Mapping[str, Tensor]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, images in sets.items():
        yield name, slice(start, start + len(images))
        start += len(images)
    if len(sets) > 1:
        yield "all", slice(0, start)


def _sets(arguments: argparse.Namespace, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Test and development images by name, as many of each name in both: calibration needs the same mixture."""
    test, dev = (
        {name: read_set(path, size, arguments.images, arguments.seed) for name, path in map(named_source, sources)}
        for sources in (arguments.data, arguments.dev)
    )
    if list(test) != list(dev):
        raise ValueError(f"--data has {', '.join(test)} and --dev {', '.join(dev)}; name them alike: NAME=SOURCE")
    for name in test:
        count = min(len(test[name]), len(dev[name]))
        test[name], dev[name] = test[name][:count], dev[name][:count]
    return test, dev


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenthrift evaluate karl",
        description="Judge a KARL model on images; writes report.md, report.json and plots. A SOURCE is a folder of "
        "images, a .npy array, a .npz of JPEG files, or a .jsonl manifest; give several sets as NAME=SOURCE.",
    )
    parser.add_argument("--model", required=True, help="a folder, or owner/name on the Hugging Face Hub")
    parser.add_argument("--data", required=True, nargs="+", metavar="SOURCE", help="test images")
    parser.add_argument("--dev", required=True, nargs="+", metavar="SOURCE", help="other images, to calibrate on")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--error", type=float, default=0.05, help="wanted error (default: %(default)s, the paper's)")
    parser.add_argument("--alpha", type=float, default=0.1, help="share that may miss (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="most images of each set (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of which images are taken (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default: cpu)")
    return parser
