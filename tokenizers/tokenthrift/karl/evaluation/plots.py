"""The figures of an evaluation: error against tokens, targets and errors, tokens against complexity, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenthrift.evaluation.report import new_figure
from tokenthrift.karl.evaluation.complexity import Complexity
from tokenthrift.karl.evaluation.rate_distortion import Point
from tokenthrift.karl.evaluation.sweeps import fewest
from tokenthrift.karl.training.image_log import image_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "error_against_tokens",
    "examples",
    "gallery",
    "rate_distortion",
    "target_and_achieved",
    "tokens_against_complexity",
    "tokens_and_oracle",
]


def error_against_tokens(
    used: Tensor, achieved: Tensor, counts: Sequence[int], at_counts: Tensor, ladder: Sequence[float]
) -> Figure:
    """Mean error over mean tokens: adaptive under many conditions, one count for all, and the search oracle.

    Args:
        used: `(N, conditions)` tokens.
        achieved: `(N, conditions)` errors.
        counts: fixed ones, ascending.
        at_counts: `(N, counts)` errors.
        ladder: target errors of the oracle's curve.
    """
    figure, axes = new_figure()
    axes.plot(used.double().mean(0), achieved.mean(0), "o-", markersize=3, label="KARL, one pass")
    axes.plot(counts, at_counts.mean(0), "s-", markersize=3, label="the same count for all")
    best = [fewest(at_counts, counts, target) for target in ladder]
    columns = [torch.searchsorted(torch.tensor(counts), count) for count in best]
    errors = [at_counts.gather(1, column[:, None]).mean() for column in columns]
    axes.plot([b.double().mean() for b in best], errors, ":", color="0.4", label="search oracle")
    axes.set(xlabel="mean tokens", ylabel="mean L1", title="Error against tokens")
    axes.set_xlim(0, max(counts) * 1.02)
    axes.legend()
    result: Figure = figure
    return result


def target_and_achieved(ladder: Sequence[float], achieved: Tensor, alpha: float) -> Figure:
    """What conditioning leads to: the mean error, and the one that all but a share `alpha` of images stay within."""
    figure, axes = new_figure(5.5, 4.5)
    axes.plot(ladder, achieved.mean(0), "o-", markersize=3, label="mean")
    axes.plot(ladder, achieved.double().quantile(1 - alpha, 0), "^-", markersize=3, label=f"{1 - alpha:.0%} quantile")
    axes.plot([0, max(ladder)], [0, max(ladder)], color="0.6", linewidth=1, label="as conditioned")
    axes.set(xlabel="error conditioned on", ylabel="achieved error (L1)", title="Target and achieved error")
    axes.legend()
    result: Figure = figure
    return result


def tokens_and_oracle(tokens: Tensor, oracle: Tensor, native: int) -> Figure:
    """Tokens of each image against the fewest that would have done."""
    figure, axes = new_figure(5.0, 5.0)
    # The oracle's counts lie on a grid; a little noise shows how many images share a point.
    shift = torch.rand(len(oracle), generator=torch.Generator().manual_seed(0)) * native / 40
    axes.scatter(oracle + shift, tokens, s=8, alpha=0.4, edgecolors="none")
    axes.plot([0, native], [0, native], color="0.6", linewidth=1)
    axes.set(xlabel="fewest tokens that meet the error (search)", ylabel="tokens used (one pass)")
    axes.set(xlim=(0, native * 1.05), ylim=(0, native * 1.05), title="One pass and search")
    result: Figure = figure
    return result


def tokens_against_complexity(found: Mapping[str, Complexity], native: int) -> Figure:
    """Tokens against complexity, a color for each family.

    Args:
        found: by family.
        native: most tokens.
    """
    figure, axes = new_figure(7.5, 5.0)
    for number, (family, one) in enumerate(found.items()):
        axes.scatter(one.bytes, one.tokens, s=14, alpha=0.6, label=family, color=f"C{number}", edgecolors="none")
    axes.axhline(native, color="0.7", linewidth=1, linestyle=":")
    axes.set(xlabel="complexity: bytes as JPEG, quality 75", ylabel="tokens", title="Tokens against complexity")
    axes.set_ylim(0, native * 1.05)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    result: Figure = figure
    return result


def examples(found: Mapping[str, Complexity]) -> Figure:
    """Originals over reconstructions, with tokens and error below, a row for each family.

    Args:
        found: by family.
    """
    rows = {family: one.examples for family, one in found.items()}
    width = max(map(len, rows.values()))
    figure, axes = new_figure(1.2 * width + 1.2, 2.7 * len(rows), nrows=len(rows), squeeze=False)
    for cell, (family, shown) in zip(axes[:, 0], rows.items(), strict=True):
        # One image a family: an axes for each image would take matplotlib a minute to lay out.
        originals, decoded = [image for image, _, _, _ in shown], [image for _, image, _, _ in shown]
        strip = image_rows([torch.stack(originals), torch.stack(decoded)])
        cell.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        step = strip.shape[2] / len(shown)
        labels = [f"{tokens} tokens\nerror {error:.3f}" for _, _, tokens, error in shown]
        cell.set_xticks([step * (i + 0.5) for i in range(len(shown))], labels, fontsize=7)
        cell.set_yticks([strip.shape[1] * share for share in (0.25, 0.75)], ["original", "decoded"], fontsize=7)
        cell.tick_params(length=0)
        cell.set_frame_on(False)
        cell.set_title(family, fontsize=9, loc="left")
    result: Figure = figure
    return result


def rate_distortion(sets: Mapping[str, Sequence[Point]]) -> Figure:
    """PSNR against bytes, a panel for each set of images, every way a line.

    Args:
        sets: points by the name of a set; those of one way stand together.
    """
    figure, panels = new_figure(4.5 * len(sets), 4.0, ncols=len(sets), squeeze=False)
    for axes, (name, points) in zip(panels[0], sets.items(), strict=True):
        for way in dict.fromkeys(point.way for point in points):
            own = [point for point in points if point.way == way]
            axes.plot([p.bytes for p in own], [p.psnr for p in own], "o-", markersize=3, label=way)
        axes.legend()
        axes.set(xscale="log", xlabel="bytes an image, everything counted", ylabel="PSNR (dB)", title=name)
    result: Figure = figure
    return result


def gallery(images: Tensor, counts: Sequence[int]) -> Figure:
    """Originals, and to the right of each what more and more tokens make of it.

    Args:
        images: `(N, 1 + counts, 3, H, W)`, the original first.
        counts: tokens of the others.
    """
    grid = image_rows(list(images.unbind(0)))
    figure, axes = new_figure(1.1 * images.shape[1], 1.1 * len(images) + 0.3)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    step = grid.shape[2] / images.shape[1]
    labels = ["original", *(f"{count}" for count in counts)]
    axes.set_xticks([step * (i + 0.5) for i in range(len(labels))], labels, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    result: Figure = figure
    return result
