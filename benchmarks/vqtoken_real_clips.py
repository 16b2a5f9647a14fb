"""Training-free reducers on real clips: `python benchmarks/vqtoken_real_clips.py CACHE --rows ROWS --chart PNG`.

CACHE is what `recipes/vqtoken/real_clips.py` wrote with one encoder: 392 tokens a clip, six tasks, of which the
principal `--channels` are read. Every reducer leaves 4 to 64 tokens; a linear probe reads what is left and says the
label. The probe sees a set of tokens as a language model does, each once and unweighted: their mean, their maximum in
each channel, and their mean weighted by time (from -1 to 1, by `TokenBatch.positions`). It is a ridge regression onto
the classes; its penalty is chosen on a part of the training groups. A split holds out whole groups of clips; accuracy
is the mean of five splits. Splits share clips, so that the 95 % interval is the corrected resampled t of Nadeau and
Bengio (1.7 to 2 times as wide as Student's). A reducer is compared with VQToken split by split.

`--part development` has 30 % of the groups, on which everything was chosen; `--part test`, the default, the others. The
tasks `film` and `speaker` have too few recordings for that: all their clips are for the test.
Every row is appended to `--rows` when it is done, and a rerun computes those that are missing.

The last tables compare K by content with one K for all clips, so that both spend exactly the same number of codes:
the share of a clip's scatter that its codes leave, mean over clips, and the 95 % interval of the paired difference.
`filmed` are the clips of the task `film`. `still to montage` are every third of them three times: their first frame
repeated, as filmed, and with frames that are each from another of these clips. One K for all is measured twice: by
plain k-means, and by merging the same 128 clusters as the adaptive codes, which leaves adaptivity as the only
difference. The interval is over recordings: versions, damaged copies and windows of one recording are no sample.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from tokenthrift.evaluation.statistics import grouped_interval, mean_and_interval
from tokenthrift.reducers import AveragePooling, BipartiteMerging, NormPruning, RandomSubset, TokenReducer, Uniform
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken, VQTokenConfig, adaptive
from tokenthrift.vqtoken.clustering import find, unit_tokens

COUNTS, SPLITS, HELD_OUT = (4, 8, 16, 32, 64), 5, 0.3
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
SIDE = 7
TASKS = ("camera", "cut in", "first word", "direction", "film", "speaker")
CHARTED = TASKS[:5]  # of speakers there is one recording each
DEVELOPMENT, DEVELOPMENT_SEED = 0.3, 1000
MOST = 128  # codes of a clip in the adaptive tables
OURS = "VQToken, time"
REDUCERS: dict[str, Callable[[], TokenReducer]] = {
    OURS: lambda: VQToken(VQTokenConfig(time_share=0.3)),
    "VQToken, outliers": lambda: VQToken(VQTokenConfig(outlier_share=0.5)),
    "VQToken, both": lambda: VQToken(VQTokenConfig(outlier_share=0.5, time_share=0.3)),
    "VQToken": VQToken,
    "ToMe": BipartiteMerging,
    "pooling": AveragePooling,
    "pruning by norm": NormPruning,
    "uniform": Uniform,
    "random": RandomSubset,
}


class Task(NamedTuple):
    """Clips `(N, T, 49, D)` fp16, labels and groups `(N,)`."""

    features: Tensor
    labels: Tensor
    groups: Tensor

    def part(self, name: str) -> Task:
        """The clips for "development", or those for "test"; no group has clips in both.

        Where a class has fewer than four groups all clips are for the test, and nothing is chosen on them.
        """
        fewest = min(len(self.groups[self.labels == label].unique()) for label in self.labels.unique())
        share = DEVELOPMENT if fewest >= 4 else 0.0
        chosen = held_out(self.groups, self.labels, DEVELOPMENT_SEED, share) == (name == "development")
        return Task(self.features[chosen], self.labels[chosen], self.groups[chosen])

    def narrow(self, channels: int) -> Task:
        """In so many channels, those that hold most of the squared length of 4,000 of the tokens; a rotation else."""
        tokens = self.features.flatten(0, 2)
        if tokens.shape[1] <= channels:
            return self
        chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:4000]
        sample = tokens[chosen].float()
        basis = torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -channels:]
        features = torch.stack([clip.float() @ basis for clip in self.features])
        return Task(features, self.labels, self.groups)

    def test_to_training(self) -> float:
        """Clips held out for each that is not, mean over splits."""
        held = [held_out(self.groups, self.labels, seed, HELD_OUT).float().mean().item() for seed in range(SPLITS)]
        return float(np.mean([share / (1 - share) for share in held]))

    def recordings(self) -> list[int]:
        """Of every clip of the task `film`: the first of the files that are cut alike, as copies share groups."""
        sharing = [torch.isin(self.groups, self.groups[self.labels == label]) for label in self.labels.unique()]
        return [min(int(self.labels[clips].min()) for clips in sharing if clips[i]) for i in range(len(self.labels))]

    def some(self, most: int) -> Task:
        """At most so many of the clips, the same every time."""
        chosen = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))[:most].sort().values
        return Task(self.features[chosen], self.labels[chosen], self.groups[chosen])


def reduced(task: Task, reducer: TokenReducer, budget: str | int, batch: int = 32) -> Tensor:
    """What the probe reads of every clip `(N, 3 D)`."""
    readings = []
    for clips in task.features.split(batch):
        frames = clips.shape[1]
        tokens = TokenBatch.from_embeddings(clips.float().flatten(1, 2), grids=[(frames, SIDE, SIDE)] * len(clips))
        tokens = reducer.reduce(tokens, budget)
        x, mask = tokens.embeddings, tokens.mask[..., None]
        time = (tokens.positions // SIDE**2).float()[..., None] * (2 / (frames - 1)) - 1
        count = mask.sum(1)
        mean = (x * mask).sum(1) / count
        highest = x.masked_fill(~mask, float("-inf")).amax(1)
        readings.append(torch.cat([mean, highest, (x * time * mask).sum(1) / count], 1))
    return torch.cat(readings)


def ridge(x: Tensor, labels: Tensor, penalty: float, test: Tensor) -> Tensor:
    """Predicted classes of `test` by kernel ridge regression onto +-1 targets; standardized by the training rows."""
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test = ((rows - mean) / spread / x.shape[1] ** 0.5 for rows in (x, test))
    targets = 2.0 * torch.nn.functional.one_hot(labels) - 1
    center = targets.mean(0)
    kernel = x @ x.T + torch.eye(len(x)) / penalty
    found: Tensor = test @ (x.T @ torch.linalg.solve(kernel, targets - center)) + center
    return found.argmax(1)


def held_out(groups: Tensor, labels: Tensor, seed: int, share: float) -> Tensor:
    """True for the clips of about `share` of the groups of every label: one at least if there is another."""
    held, generator = torch.zeros(len(groups), dtype=torch.bool), torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for label in labels.unique():
        own = [group for group in groups[labels == label].unique().tolist() if group not in done]
        order = torch.randperm(len(own), generator=generator).tolist()
        count = max(round(share * len(own)), int(share > 0 and len(own) > 1))
        chosen = [own[i] for i in order[:count]]
        done |= set(own)
        held |= torch.isin(groups, torch.tensor(chosen, dtype=groups.dtype))
    return held


def accuracies(x: Tensor, task: Task) -> list[float]:
    """Of the probe on `SPLITS` splits."""
    out = []
    for seed in range(SPLITS):
        test = held_out(task.groups, task.labels, seed, HELD_OUT)
        rows, labels, groups = x[~test], task.labels[~test], task.groups[~test]
        inner = held_out(groups, labels, seed + 100, 0.25)

        def right(penalty: float, rows: Tensor = rows, labels: Tensor = labels, inner: Tensor = inner) -> float:
            found = ridge(rows[~inner], labels[~inner], penalty, rows[inner])
            return (found == labels[inner]).float().mean().item()

        best = max(PENALTIES, key=right)
        out.append((ridge(rows, labels, best, x[test]) == task.labels[test]).float().mean().item())
    return out


def reducers_table(tasks: dict[str, Task], path: Path | None) -> list[dict[str, Any]]:
    """Accuracy of every reducer, count and task; rows that `path` holds are read, and none of other tasks returned."""
    rows: list[dict[str, Any]] = []
    if path is not None and path.exists():
        read = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in read if row["task"] in tasks]
    known = {(row["task"], row["reducer"], row["count"]) for row in rows}
    for count in (None, *COUNTS):  # None leaves all tokens
        for name, task in tasks.items():
            ways: dict[str, Callable[[], TokenReducer]] = {"all tokens": Uniform} if count is None else REDUCERS
            budget = int(np.prod(task.features.shape[1:3])) if count is None else count
            for reducer, make in ways.items():
                if (name, reducer, budget) in known:
                    continue
                x = reduced(task, make(), budget)
                rows.append({"task": name, "reducer": reducer, "count": budget, "accuracy": accuracies(x, task)})
                if path is not None:
                    with path.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    return rows


def accuracy_of(rows: list[dict[str, Any]], reducer: str, count: int, task: str | None) -> list[float]:
    """Of every split; the mean over tasks where none is named."""
    found = [
        row["accuracy"]
        for row in rows
        if (row["reducer"], row["count"]) == (reducer, count) and task in (None, row["task"])
    ]
    return [float(value) for value in np.mean(found, 0)]


def still_to_montage(clips: Tensor) -> Tensor:
    """Clips `(N, T, 49, D)`, thrice: their first frame repeated, as they are, and with frames of other clips."""
    frames = torch.arange(clips.shape[1])
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(clips), generator=generator) for _ in frames]
    montage = torch.stack([clips[order, frame] for frame, order in zip(frames, orders, strict=True)], 1)
    return torch.cat([clips[:, :1].expand_as(clips), clips, montage])


def spread_evenly(total: int, clips: int) -> Tensor:
    """`(clips,)` counts that add up to `total` and differ by at most one."""
    order = torch.randperm(clips, generator=torch.Generator().manual_seed(0))
    return total // clips + (order < total % clips).long()


def best_baselines(rows: list[dict[str, Any]], ratios: dict[str, float]) -> Table:
    """What the best way that is not VQToken has more than `OURS`; "behind" where the interval is above 0."""
    table = Table("", *map(str, COUNTS), title=f"the best baseline, and what it has more than {OURS}, points")
    for task in (*ratios, None):
        ratio = float(np.mean([*ratios.values()])) if task is None else ratios[task]
        cells = []
        for count in COUNTS:
            found = {name: accuracy_of(rows, name, count, task) for name in REDUCERS if not name.startswith("VQToken")}
            best = max(found, key=lambda name: math.fsum(found[name]))
            ours = accuracy_of(rows, OURS, count, task)
            ahead, error = mean_and_interval(np.subtract(found[best], ours).tolist(), test_to_training=ratio)
            cells.append(f"{best} {100 * ahead:+.1f} ± {100 * error:.1f}{' behind' if ahead > error else ''}")
        table.add_row(task or "mean", *cells)
    return table


def adaptive_table(name: str, clips: Tensor, recordings: list[int]) -> list[dict[str, Any]]:
    """Codes by content against one number of codes for all of clips `(N, T, 49, D)`.

    The intervals are over the recordings that the clips are from.
    """
    states = []
    for part in clips.split(24):
        unit, mask = unit_tokens(part.float().flatten(1, 2), None)
        found = find(unit, mask, torch.full((len(unit),), MOST))
        states.append((unit, mask, found, adaptive.tree_of(found)))
    curve = torch.cat([adaptive.errors(found, tree) for _, _, found, tree in states])
    sizes = [len(unit) for unit, *_ in states]
    least, most = torch.ones(len(clips), dtype=torch.long), torch.full((len(clips),), MOST)

    def from_tree(counts: Tensor) -> Tensor:
        parts = zip(states, counts.split(sizes), strict=True)
        return torch.cat([adaptive.merged(u, m, found, tree, k).error() for (u, m, found, tree), k in parts])

    def plain(counts: Tensor) -> Tensor:
        parts = zip(states, counts.split(sizes), strict=True)
        return torch.cat([find(unit, mask, k).error() for (unit, mask, *_), k in parts])

    rules = {f"gain {gain:g}": adaptive.by_gain(curve, gain, least, most) for gain in (0.02, 0.01, 0.005, 0.003)}
    for target in (0.4, 0.3, 0.2):
        targets = torch.full((len(clips),), target, dtype=torch.float64)
        rules[f"error {target:g}"] = adaptive.by_error(curve, targets, least, most)
    rows = []
    for rule, counts in rules.items():
        even, left = spread_evenly(int(counts.sum()), len(counts)), from_tree(counts)
        row: dict[str, Any] = {"clips": name, "rule": rule, "mean codes": counts.float().mean().item()}
        row |= {"fewest": int(counts.min()), "most": int(counts.max()), "left": left.mean().item()}
        for way, beside in (("one K", plain(even)), ("one K, same tree", from_tree(even))):
            row[way] = beside.mean().item()
            row[f"{way}, gain"] = grouped_interval((beside - left).tolist(), recordings)
        rows.append(row)
    return rows


def chart(rows: list[dict[str, Any]], tasks: list[str], path: Path) -> None:
    """Accuracy against tokens, a panel for each of these tasks, and their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {OURS: "#b2182b", "VQToken": "#ef8a62", "ToMe": "#2166ac", "pooling": "#4d4d4d", "random": "#bbbbbb"}
    lines["uniform"] = "#1b7837"
    panels: list[str | None] = [*tasks, None]
    done = {(row["task"], row["reducer"], row["count"]) for row in rows}
    counts = [count for count in COUNTS if all((task, way, count) in done for task in tasks for way in lines)]
    across = 3
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.6 * across, 3.2 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, panels, strict=False):
        kept = [row for row in rows if row["task"] in tasks]
        ends: list[tuple[float, str, str]] = []
        for reducer, color in lines.items():
            heights = [100 * mean_and_interval(accuracy_of(kept, reducer, count, task))[0] for count in counts]
            axis.plot(counts, heights, color=color, marker="o", markersize=3, linewidth=2 if reducer == OURS else 1.2)
            ends.append((heights[-1], reducer, color))
        low, high = axis.get_ylim()
        at = -float("inf")
        for height, reducer, color in sorted(ends):  # labels at the lines' ends, apart from each other
            at = max(height, at + 0.055 * (high - low))
            axis.text(1.1 * counts[-1], at, reducer, color=color, va="center", fontsize=8)
        axis.set_ylim(low, max(high, at + 0.08 * (high - low)))
        axis.set(
            xscale="log",
            xticks=counts,
            xticklabels=counts,
            xlim=(counts[0] * 0.9, counts[-1] * 8),
            title=task or f"mean of the {len(tasks)}",
        )
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="accuracy, %", xlabel="tokens of 392")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="only these")
    parser.add_argument("--clips", type=int, default=100, help="at most so many of each task, drawn at random")
    parser.add_argument("--channels", type=int, default=256, help="principal channels of the features that are read")
    parser.add_argument("--part", choices=("test", "development"), default="test")
    parser.add_argument("--rows", type=Path, help="JSON lines; a row for each task, reducer and count")
    parser.add_argument("--chart", type=Path, help="PNG of the tasks that tell ways apart")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, tasks = Console(width=140), {}
    for name in arguments.tasks:
        whole = Task(**load_file(arguments.cache / f"{name}.safetensors")).part(arguments.part)
        tasks[name] = whole.some(arguments.clips).narrow(arguments.channels)
    rows = reducers_table(tasks, arguments.rows)
    ratios = {name: task.test_to_training() for name, task in tasks.items()}
    for name in [*tasks, "mean"]:
        table = Table("reducer", *map(str, COUNTS), title=f"{name}: accuracy in %, 95 % interval of {SPLITS} splits")
        task, ratio = (None, float(np.mean([*ratios.values()]))) if name == "mean" else (name, ratios[name])
        for reducer in ["all tokens", *REDUCERS]:
            counts = sorted({row["count"] for row in rows if row["reducer"] == reducer})
            cells = []
            for count in counts:
                own = accuracy_of(rows, reducer, count, task)
                mean, error = mean_and_interval(own, test_to_training=ratio)
                cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
                if reducer not in ("all tokens", OURS):
                    more = np.subtract(own, accuracy_of(rows, OURS, count, task)).tolist()
                    ahead, error = mean_and_interval(more, test_to_training=ratio)
                    cells[-1] += f" ({100 * ahead:+.1f} ± {100 * error:.1f})"
            table.add_row(reducer, *cells)
        console.print(table)
    console.print(f"in brackets: what a reducer has more than {OURS}")
    console.print(best_baselines(rows, ratios))
    if "film" in tasks:
        clips, recordings = tasks["film"].features, tasks["film"].recordings()
        for name, mixed, of in (
            ("filmed", clips, recordings),
            ("still to montage", still_to_montage(clips[::3]), 3 * recordings[::3]),
        ):
            for row in adaptive_table(name, mixed, of):
                console.print(row)
    if arguments.chart:
        chart(rows, [name for name in CHARTED if name in tasks], arguments.chart)


if __name__ == "__main__":
    main()
