"""`tokenthrift evaluate karl`: whether adaptive tokens help, and how often a target error is missed.

The published evaluation (arXiv 2507.07995) compares models with each other at a few counts; its code does not run. Here
a model is compared with itself: the same decoder with one fixed count for all images, at exactly the same mean number
of tokens, and a search that knows the answer, the smallest count of each image that meets the target. With `--dev` a
calibration is made on those images; without, that of the model is used, if it has one. Every figure is of `--data`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError
from tokenthrift.evaluation.report import write_report
from tokenthrift.karl.evaluation import plots, tables
from tokenthrift.karl.evaluation.complexity import complexity_of, complexity_table, families
from tokenthrift.karl.evaluation.image_sets import named_source, read_set
from tokenthrift.karl.evaluation.metrics import perceptual
from tokenthrift.karl.evaluation.sweeps import LADDER, at_errors, calibrate, fewest, sweep
from tokenthrift.karl.evaluation.ways import Way, equal_mean, fixed, quality, times, verified
from tokenthrift.karl.model import Karl
from tokenthrift.quality import measured_curve, save_curves

__all__ = ["run"]

Sets = dict[str, Tensor]


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures a model and writes the report.

    Args:
        arguments: as `command` reads them.
        argv: the same as text, for the report.
    """
    torch.manual_seed(arguments.seed)
    karl = Karl.from_pretrained(arguments.model, revision=arguments.revision, device=arguments.device)
    height, width = karl.config.size
    if height != width:
        raise ValueError(f"evaluation reads square images; this model is trained on {height} x {width} pixels")
    test, dev = _sets(arguments, height)
    with torch.inference_mode():
        _report(karl, test, dev, arguments, argv)
    print(arguments.out / "report.md")
    return 0


def _report(karl: Karl, test: Sets, dev: Sets, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    native, target, batch = karl.config.max_tokens, arguments.error, arguments.batch_size
    images = torch.cat(list(test.values()))
    grid = list(range(0, native + 1, max(1, native // 32)))[1:]
    log = partial(print, file=sys.stderr, flush=True)
    calibration = karl.config.calibration
    if dev:
        log(f"calibrating on {sum(map(len, dev.values()))} images")
        calibration = calibrate(karl, torch.cat(list(dev.values())), arguments.alpha, (target,), batch)
    log(f"sweeping {len(images)} images over {len(LADDER)} errors and {len(grid)} counts")
    used, achieved, at_grid = sweep(karl, images, errors=LADDER, counts=grid, batch=batch)

    name, distance = perceptual()
    measured = partial(quality, karl, images, extra={name: distance}, batch=batch)
    log("measuring")
    one_pass = measured(partial(at_errors, karl, error=target))
    mean = one_pass.tokens.double().mean().item()
    same = measured(fixed(karl, equal_mean(mean, len(images), native)))
    oracle = fewest(at_grid, grid, target)
    ways = {
        "one pass": Way(one_pass),
        "one pass, verified": verified(karl, target, measured),
        "fixed count, same mean": Way(same),
        "all tokens": Way(measured(fixed(karl, torch.full((len(images),), native)))),
        "search oracle": Way(measured(fixed(karl, oracle)), None, None),
    }
    condition = calibrated = None
    notes = [
        f"Errors are mean absolute differences per pixel in [0, 1]. The perceptual column is {name}.",
        f"The oracle tries every {grid[0]} tokens. Misses are counted over all images.",
    ]
    if calibration is not None:
        try:
            condition = calibration.request(target)
            calibrated = measured(partial(at_errors, karl, error=condition))
            ways["one pass, calibrated"] = Way(calibrated)
        except BudgetError as error:
            notes.append(f"No calibrated encoding: {error}.")
            log(notes[-1])
    compared = []
    for i, asked in enumerate(LADDER):
        if not 0.02 <= asked <= 0.12:
            continue
        average = used[:, i].double().mean().item()
        counts = equal_mean(average, len(images), native)
        compared.append((asked, average, achieved[:, i], quality(karl, images, fixed(karl, counts), {}, batch).error))
    log("complexity")
    found = {f: complexity_of(karl, some, target) for f, some in families(karl, test, arguments.seed).items()}
    settings = {
        "model": str(arguments.model),
        "test": "; ".join(f"{n}: {len(s)} images" for n, s in test.items()),
        "dev (calibration)": "; ".join(f"{n}: {len(s)} images" for n, s in dev.items()) or "none",
        "target error": target,
        "native tokens": native,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "command": "tokenthrift evaluate karl " + " ".join(argv),
    }
    # What an image of its mean color leaves to be reconstructed, pixel by pixel.
    flat = (images.float() - images.float().mean((2, 3), keepdim=True)).abs().mean().item()
    flat /= 255 if images.dtype == torch.uint8 else 1
    left = at_grid.double().mean(0).tolist()
    curve = measured_curve(
        [(n, 1 - error / flat if flat else 1.0) for n, error in zip(grid, left, strict=True)],
        kind="image",
        metric="share of the deviation from an image's mean color that is reconstructed",
        data=str(settings["test"]),
        command=str(settings["command"]),
    )
    write_report(
        arguments.out,
        title=f"KARL: {Path(arguments.model).name}",
        settings=settings,
        tables=[
            tables.ways_table(karl.config, ways, times(karl, images, target), target),
            tables.equal_table(compared),
            tables.sets_table(test, one_pass, same, oracle, target),
            tables.misses_table(test, one_pass, target, calibration, condition, calibrated),
            complexity_table(found),
        ],
        figures={
            "error_against_tokens": plots.error_against_tokens(used, achieved, grid, at_grid, LADDER),
            "target_and_achieved": plots.target_and_achieved(LADDER, achieved, arguments.alpha),
            "tokens_and_oracle": plots.tokens_and_oracle(one_pass.tokens, oracle, native),
            "tokens_against_complexity": plots.tokens_against_complexity(found, native),
            "examples": plots.examples(found),
        },
        notes=notes,
    )
    save_curves(arguments.model, arguments.out, [curve])


def _sets(arguments: argparse.Namespace, size: int) -> tuple[Sets, Sets]:
    """Test and development images by name, as many of each name in both: calibration needs the same mixture."""
    test, dev = (
        {name: read_set(path, size, arguments.images, arguments.seed) for name, path in map(named_source, sources)}
        for sources in (arguments.data, arguments.dev)
    )
    if not dev:
        return test, dev
    if list(test) != list(dev):
        raise ValueError(f"--data has {', '.join(test)} and --dev {', '.join(dev)}; name them alike: NAME=SOURCE")
    for name in test:
        count = min(len(test[name]), len(dev[name]))
        test[name], dev[name] = test[name][:count], dev[name][:count]
    return test, dev
