"""Reconstruction of real clips from few tokens: VQToken and baselines on the features of any encoder, and pictures.

    tokenthrift evaluate vqtoken --model model_cards/vqtoken-tiny --data BACKGROUNDS --clips FOLDER --out REPORT

This evaluation needs no questions and no language model, so any clip will do. Every native token of a clip is
reconstructed as the nearest kept token, whether a method keeps, merges or clusters tokens:

* explained variance: the share of the variance of the native tokens, around their mean over the clip, that the
  reconstruction reproduces; 1 is all, and below 0 is worse than the mean alone;
* feature error: one minus the mean cosine between a native token and the token nearest to it.

Both favor methods that cluster, since k-means minimizes them. They measure how much of the features is left. What a
language model makes of the tokens is measured by the questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenthrift.evaluation.report import Cell, Table, new_figure
from tokenthrift.evaluation.statistics import bootstrap_interval
from tokenthrift.media.files import find_files
from tokenthrift.media.suffixes import VIDEO_SUFFIXES
from tokenthrift.media.video import VideoError
from tokenthrift.reducers import TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.evaluation.baselines import ADAPTIVE, BASELINES, COUNTS, ERRORS, OURS, baseline
from tokenthrift.vqtoken.evaluation.flops import Stopwatch
from tokenthrift.vqtoken.evaluation.visualize import draw_clip
from tokenthrift.vqtoken.files import Sampled, sample
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.video_lm.encoders import ClipEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Reconstruction", "compare", "measure", "reconstruct", "report"]

SEEDS: Final = 3
FRAMES: Final = 16
_DRAWN: Final = (8, 32)
_FLOOR: Final = -0.5  # of the plot; what explains less is worse than a single mean by far


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """How well one method keeps one clip.

    Attributes:
        clip, method, budget: names of clip and method, and the budget in short form.
        tokens: how many were left.
        explained: variance, at most 1.
        error: of features, 0 to 2.
    """

    clip: str
    method: str
    budget: str
    tokens: float
    explained: float
    error: float


def reconstruct(native: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Explained variance and feature error when every native token is replaced by the nearest of some tokens.

    Args:
        native: (N, D) floating point.
        tokens: (K, D), at least one.
    """
    native, tokens = native.double(), tokens.double()
    nearest = tokens[torch.cdist(native, tokens).argmin(1)]
    variance = float((native - native.mean(0)).square().sum())
    lost = float((native - nearest).square().sum())
    explained = 1 - lost / variance if variance > 1e-9 * float(native.square().sum()) else 1.0
    return explained, float(1 - cosine_similarity(native, nearest).mean())


def measure(native: TokenBatch, reducer: TokenReducer, budget: str) -> tuple[float, float, float]:
    """Tokens, explained variance and feature error of one clip.

    Args:
        native: A batch of one clip whose tokens fill its grid.
        reducer: Any.
        budget: Ceilings in short form.
    """
    (item,) = reducer.reduce(native, budget).items()
    return len(item), *reconstruct(native.embeddings[0], item)


def compare(
    clip: str, native: TokenBatch, reducer: VQToken, counts: Sequence[int], errors: Sequence[float]
) -> list[Reconstruction]:
    """VQToken, adaptive VQToken and all baselines on one clip; the random baseline is the mean of three draws."""
    assert native.grids is not None
    rows = []
    for count in counts:
        for name in (OURS, *BASELINES):
            seeds = range(SEEDS) if name == "random" else range(1)
            done = [
                measure(native, reducer if name == OURS else baseline(name, native.grids[0], seed), str(count))
                for seed in seeds
            ]
            tokens, explained, error = (fmean(values) for values in zip(*done, strict=True))
            rows.append(
                Reconstruction(
                    clip=clip, method=name, budget=str(count), tokens=tokens, explained=explained, error=error
                )
            )
    for target in errors if "target_error" in reducer.support.fields else ():
        tokens, explained, error = measure(native, reducer, f"e{target}")
        rows.append(
            Reconstruction(
                clip=clip, method=ADAPTIVE, budget=f"e{target}", tokens=tokens, explained=explained, error=error
            )
        )
    return rows


def report(
    folder: Path,
    encoder: ClipEncoder,
    out: Path,
    *,
    counts: Sequence[int] = COUNTS,
    errors: Sequence[float] = ERRORS,
    frames: int = FRAMES,
) -> tuple[list[Table], dict[str, Figure], list[str]]:
    """Tables, plots and remarks about the clips of a folder, for `write_report`, and OUT/visualizations/NAME.png.

    VQToken is used without weights, as VQ-attention makes tokens for a language model and not for rebuilding features.
    A clip that cannot be read is left out and named in the remarks.

    Args:
        folder: With video files.
        encoder: What makes native tokens.
        out: Where pictures go.
        counts: Of tokens.
        errors: That adaptive VQToken may leave.
        frames: Of a clip, where the encoder leaves the choice.

    Raises:
        InputError: There is no video file.
        ValueError: None of them can be read.
    """
    reducer, rows, notes, natives = VQToken(), list[Reconstruction](), list[str](), list[int]()
    times = list[tuple[Cell, ...]]()
    clips_found = find_files([str(folder)], VIDEO_SUFFIXES, "video")
    if remark := clips_found.remark("rename them to be read"):
        notes.append(f"{remark}.")
    for found in clips_found:
        # Below the folder, with the suffix of the file: names alone may repeat.
        name, watch = found.output.with_name(found.path.name).as_posix(), Stopwatch()
        try:
            with watch.measure("decode"):
                clip = sample(found.path, encoder, frames)
        except VideoError as problem:
            notes.append(f"Left out: {name}: {problem.reason}.")
            continue
        grid = encoder.grid(len(clip.pixels))
        with watch.measure("encode"):
            features = encoder.encode(clip.pixels)
        cells = features.float().cpu()[: grid[0] * grid[1] * grid[2]]
        native = TokenBatch.from_items([cells], [clip.seconds], [grid])
        natives.append(len(cells))
        for count in counts:
            if count < len(cells):
                with watch.measure(f"reduce to {count}"):
                    reducer.reduce(native, count)
        steps = ("decode", "encode", *(f"reduce to {count}" for count in counts))
        spent = (1000 * watch.seconds[step] if step in watch.seconds else None for step in steps)
        times.append((name, len(clip.pixels), *spent))
        rows += compare(name, native, reducer, [count for count in counts if count < len(cells)], errors)
        _draw(out / "visualizations" / f"{found.output.as_posix().replace('/', '-')}.png", name, clip, native, reducer)
    if not rows:
        raise ValueError(f"{folder}: no clip could be read. {' '.join(notes)}")
    clips = list(dict.fromkeys(row.clip for row in rows))
    notes.append(
        f"Real clips: {len(clips)} ({', '.join(clips)}), {min(natives)} to {max(natives)} native tokens each from the "
        f"encoder “{encoder.name}”; VQToken without weights. Pictures of the regions: visualizations/."
    )
    return [_summary(rows), _by_clip(rows), _times(times, counts)], {"reconstruction": _plot(rows)}, notes


def _draw(path: Path, name: str, clip: Sampled, native: TokenBatch, reducer: VQToken) -> None:
    maps = {}
    for count in _DRAWN:
        if count < native.embeddings.shape[1]:
            found = reducer.compress(native, count)
            maps[f"{count} tokens of {native.embeddings.shape[1]:,}"] = found.maps[0]
    draw_clip(path, f"{name}, {clip.seconds:.1f} s", clip.pixels, clip.times, maps, aspect=clip.aspect)


def _groups(rows: Sequence[Reconstruction]) -> dict[tuple[str, str], list[Reconstruction]]:
    """Rows by method and budget, VQToken first of those that ask the same."""
    groups: dict[tuple[str, str], list[Reconstruction]] = defaultdict(list)
    for row in rows:
        groups[row.budget, row.method].append(row)
    return dict(sorted(groups.items(), key=lambda pair: (pair[0][0].startswith("e"), float(pair[0][0].lstrip("e")))))


def _summary(rows: Sequence[Reconstruction]) -> Table:
    lines: list[tuple[Cell, ...]] = []
    for (budget, method), group in _groups(rows).items():
        explained, low, high = bootstrap_interval([row.explained for row in group])
        lines.append(
            (
                budget,
                method,
                fmean(row.tokens for row in group),
                explained,
                f"{low:.3f} to {high:.3f}",
                fmean(row.error for row in group),
            )
        )
    return Table(
        title="Real clips: reconstruction of the features",
        columns=("budget", "method", "tokens", "explained variance", "95 % over clips", "feature error"),
        rows=tuple(lines),
        note="Means over clips. Every native token is rebuilt from the nearest kept one. Frame pooling keeps a product "
        "of divisors of the grid, so at times fewer tokens than it may. e0.3 asks for at most 30 % unexplained "
        "variance of the directions of tokens, with as few tokens as that takes.",
    )


def _by_clip(rows: Sequence[Reconstruction]) -> Table:
    methods = list(dict.fromkeys(row.method for row in rows if row.method != ADAPTIVE))
    budget = "32" if any(row.budget == "32" for row in rows) else rows[0].budget
    errors = sorted({row.budget for row in rows if row.method == ADAPTIVE}, reverse=True)
    at = {(row.clip, row.method, row.budget): row for row in rows}
    lines = [
        (
            clip,
            *(at[clip, method, budget].explained if (clip, method, budget) in at else None for method in methods),
            *(round(at[clip, ADAPTIVE, error].tokens) for error in errors),
        )
        for clip in dict.fromkeys(row.clip for row in rows)
    ]
    return Table(
        title=f"Clip by clip: explained variance at {budget} tokens, and the tokens that adaptive VQToken takes",
        columns=("clip", *methods, *(f"tokens at {error}" for error in errors)),
        rows=tuple(lines),
    )


def _times(rows: Sequence[tuple[Cell, ...]], counts: Sequence[int]) -> Table:
    return Table(
        title="Clip by clip: time of the steps, ms",
        columns=("clip", "frames", "decode", "encode", *(f"reduce to {count}" for count in counts)),
        rows=tuple(rows),
        note="Wall clock, one run each. Decoding is from the file to frames of the encoder's size; the first clip also "
        "pays for whatever is set up once.",
    )


def _plot(rows: Sequence[Reconstruction]) -> Figure:
    figure, (left, right) = new_figure(10, 4.2, ncols=2)
    by_method: dict[str, list[list[Reconstruction]]] = defaultdict(list)
    for (_, method), group in _groups(rows).items():
        by_method[method].append(group)
    for method, groups in by_method.items():
        ours = method in (OURS, ADAPTIVE)
        tokens = [fmean(row.tokens for row in group) for group in groups]
        style = {"marker": "D" if method == ADAPTIVE else "o", "linewidth": 2.2 if ours else 1.2, "markersize": 4}
        style |= {"linestyle": ":" if method == ADAPTIVE else "-", "zorder": 3 if ours else 2}
        explained = [fmean(row.explained for row in group) for group in groups]
        label = method if max(explained) > _FLOOR else f"{method} (below the axis)"
        left.plot(tokens, explained, label=label, **style)
        right.plot(tokens, [fmean(row.error for row in group) for group in groups], **style)
    for axes, label in ((left, "explained variance"), (right, "feature error (1 - cosine)")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("tokens of a clip")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.set_ylim(_FLOOR, 1.02)
    right.set_yscale("log")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    return figure
