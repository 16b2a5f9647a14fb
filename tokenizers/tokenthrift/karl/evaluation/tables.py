"""The tables of `tokenthrift evaluate karl`; misses are counted over all images, also those that took every token.

The published table (arXiv 2507.07995, table 3) counts only images of which some token was dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from tokenthrift.evaluation.report import Cell, Table
from tokenthrift.evaluation.statistics import bootstrap_interval
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.calibration import Calibration
from tokenthrift.karl.config import KarlConfig
from tokenthrift.karl.evaluation.metrics import spearman
from tokenthrift.karl.evaluation.ways import TIMED_BATCH, Quality, Way

__all__ = ["equal_table", "misses_table", "sets_table", "ways_table"]


def ways_table(config: KarlConfig, ways: Mapping[str, Way], times: Mapping[str, float], target: float) -> Table:
    """All ways at one target error."""
    layout = None if config.codebook_size is None else BitFormat.of(config)
    rows: list[tuple[Cell, ...]] = []
    for name, way in ways.items():
        found = way.quality
        tokens = found.tokens.double()
        bits = None if layout is None else sum(map(layout.image_bits, found.tokens.tolist())) / len(tokens)
        figures = [values.double().mean().item() for values in found.metrics.values()]
        missed = (found.error > target).double().mean().item()
        counts = (tokens.mean().item(), tokens.quantile(0.95).item(), tokens.mean().item() / config.max_tokens)
        rows.append((name, *counts, bits, *figures, missed, way.encoder_passes, way.decoder_passes, times.get(name)))
    metrics = tuple(next(iter(ways.values())).quality.metrics)
    columns = ("way", "tokens", "p95", "of native", "bits", *metrics, "missed", "encoder passes", "decoder passes")
    return Table(
        title=f"At a target error of {target:g}",
        columns=(*columns, "ms an image"),
        rows=tuple(rows),
        note=f"Bits: codes and length of an image. Time: encode and decode in batches of {TIMED_BATCH}.",
    )


def equal_table(rows: Sequence[tuple[float, float, Tensor, Tensor]]) -> Table:
    """Adaptive against fixed, under several conditions, each at exactly the same total of tokens.

    Args:
        rows: the error conditioned on, mean tokens, and the errors `(N,)` of adaptive and of fixed counts.
    """
    cells: list[tuple[Cell, ...]] = []
    for error, mean, adaptive, same in rows:
        gain, low, high = bootstrap_interval((same - adaptive).tolist())
        cells.append((error, mean, adaptive.mean().item(), same.mean().item(), gain, low, high))
    return Table(
        title="Adaptive against one count for all, at equal mean tokens",
        columns=("conditioned on", "tokens", "L1 adaptive", "L1 fixed", "fixed - adaptive", "95 % from", "to"),
        rows=tuple(cells),
        note="The interval is a bootstrap over images. Above 0, adaptive counts have the smaller error.",
    )


def sets_table(sets: Mapping[str, Tensor], one: Quality, same: Quality, oracle: Tensor, target: float) -> Table:
    """Each set of images by itself, and all of them."""
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
                (errors > target).double().mean().item(),
                spearman(tokens, oracle[part]),
            )
        )
    columns = ("set", "images", "tokens", "oracle's", "L1", "L1 fixed, same mean overall", "missed", "Spearman")
    return Table(
        title=f"By set, at a target error of {target:g}",
        columns=columns,
        rows=tuple(rows),
        note="Spearman: rank correlation of tokens and the oracle's.",
    )


def misses_table(
    sets: Mapping[str, Tensor],
    plain: Quality,
    target: float,
    calibration: Calibration | None,
    condition: float | None,
    calibrated: Quality | None,
) -> Table:
    """How many images miss the target, conditioned on it and on the calibrated error: of each set, and of all.

    Args:
        sets: images by name, in the order of the figures.
        plain: conditioned on the target.
        target: error.
        calibration: if there is one.
        condition: what it says to condition on, where it can.
        calibrated: conditioned on that.
    """
    rows: list[tuple[Cell, ...]] = []
    for way, error, found in (("as it is", target, plain), ("calibrated", condition, calibrated)):
        if found is None:
            continue
        for name, part in _parts(sets):
            errors, tokens = found.error[part], found.tokens[part].double()
            missed = (errors > target).double()
            share, low, high = bootstrap_interval(missed.tolist())
            over = (errors[missed.bool()] - target).mean().item() if missed.any() else 0.0
            rows.append((way, name, error, tokens.mean().item(), share, low, high, over))
    note = "Not calibrated: no --dev images, and no calibration in the model."
    if calibration is not None:
        note = f"Calibrated on {calibration.images} other images so that at most {calibration.alpha:.0%} miss."
    return Table(
        title=f"Misses of a target error of {target:g}",
        columns=("way", "set", "conditioned on", "tokens", "missed", "95 % from", "to", "over by"),
        rows=tuple(rows),
        note=note,
    )


def _parts(sets: Mapping[str, Tensor]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, images in sets.items():
        yield name, slice(start, start + len(images))
        start += len(images)
    if len(sets) > 1:
        yield "all", slice(0, start)
