"""`tokenthrift evaluate vqtoken`: accuracy against tokens of VQToken and of baselines, on synthetic questions.

    tokenthrift evaluate vqtoken --model model_cards/vqtoken-tiny --data data/vqtoken/backgrounds --out report

One model answers the same questions about the same clips from all native tokens, from the codes of VQToken, fixed and
adaptive, and from the tokens that each training-free baseline keeps. Every seed is another set of clips, scenes and
questions over the backgrounds of the part, and another draw of the random baseline. The model is one, so intervals
describe the figures of this model; they do not cover another training.

Token density is accuracy in percent by tokens, as in the paper (VQToken, arXiv 2503.16980, section 4); this model has
no newline row, so every token that the language model reads of a clip is counted. The paper counts without it.

With `--clips FOLDER`, the reconstruction of real clips is measured under the same methods (`reconstruction.py`).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from tokenthrift.budget import TokenBudget
from tokenthrift.evaluation.report import Cell, Table, new_figure, write_report
from tokenthrift.evaluation.statistics import mean_and_interval
from tokenthrift.quality import measured_curve, save_curves
from tokenthrift.reducers import TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.evaluation.baselines import ADAPTIVE, BASELINES, COUNTS, ERRORS, OURS, baseline
from tokenthrift.vqtoken.evaluation.flops import Stopwatch, count_flops
from tokenthrift.vqtoken.evaluation.reconstruction import report
from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer
from tokenthrift.vqtoken.synthetic.data import ClipBatch, SyntheticClips, collate
from tokenthrift.vqtoken.synthetic.questions import KINDS, Question, blind_accuracy
from tokenthrift.vqtoken.synthetic.scenes import read_backgrounds
from tokenthrift.vqtoken.video_lm.encoders import AnswererEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measured", "Method", "measure", "methods", "run"]

FIXED = (4, 5, 6, 12)
TIMED = 3  # batches of a seed whose prefill is timed apart from their answers
FULL = "all tokens"
_NOTE = (
    "All clips and questions are synthetic: colored shapes over real backgrounds, drawn by rule. One trained model; a "
    "seed is another set of clips and another draw of the random baseline."
)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table: a name, a budget, and the reducer or the name of a baseline."""

    name: str
    budget: TokenBudget
    reducer: TokenReducer | str | None


@dataclass(slots=True)
class Measured:
    """What one method did over one seed's clips.

    Attributes:
        right: of every question, whether the answer was right, by kind of question.
        tokens: of every clip.
        seconds: wall clock of all clips, by step.
        module, language: operations of the reducer, and of the language model, over the clips they were counted on.
        counted: how many clips those were.
        timed: how many clips the time of the prefill is of.
    """

    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    module: int = 0
    language: int = 0
    counted: int = 0
    timed: int = 0

    @property
    def accuracy(self) -> float:
        """Percent of all questions."""
        answers = [right for kind in self.right.values() for right in kind]
        return 100 * sum(answers) / len(answers)

    @property
    def mean_tokens(self) -> float:
        """Of a clip."""
        return sum(self.tokens) / len(self.tokens)


def methods(
    model: VideoAnswerer, counts: Sequence[int] = COUNTS, errors: Sequence[float] = ERRORS, fixed: Sequence[int] = FIXED
) -> list[Method]:
    """All rows: native tokens; every baseline and VQToken at every count; VQToken alone at some more counts, for
    comparison with the adaptive rows; and VQToken at every target error."""
    rows = [Method(FULL, TokenBudget(), None)]
    for count in counts:
        budget = TokenBudget(max_tokens=count)
        rows += [Method(name, budget, name) for name in BASELINES]
        rows.append(Method(OURS, budget, model.vqtoken))
    rows += [Method(OURS, TokenBudget(max_tokens=count), model.vqtoken) for count in fixed if count not in counts]
    for error in errors:
        rows.append(Method(ADAPTIVE, TokenBudget(max_tokens=max(counts), target_error=error), model.vqtoken))
    return rows


@torch.inference_mode()
def measure(
    model: VideoAnswerer, clips: SyntheticClips, rows: Sequence[Method], seed: int, batch_size: int = 20
) -> tuple[list[Measured], dict[str, float]]:
    """What every method does over the same clips.

    Args:
        model: answers.
        clips: with questions.
        rows: the methods.
        seed: of the random baseline.
        batch_size: clips at a time.

    Returns:
        One result a method, and the wall-clock seconds of the steps that all share.
    """
    results, shared = [Measured() for _ in rows], Stopwatch()
    grid = model.config.grid
    reducers = [baseline(row.reducer, grid, seed) if isinstance(row.reducer, str) else row.reducer for row in rows]
    for first, batch in enumerate(_batches(clips, batch_size, model.config.patch_size, shared)):
        with shared.measure("encode"):
            native = model.encode(batch.frames)
        for row, reducer, result in zip(rows, reducers, results, strict=True):
            reduce = partial(_reduce, reducer, native, row.budget)
            watch = Stopwatch()
            with watch.measure("reduce"):
                tokens = reduce()
            if first < TIMED:
                with watch.measure("prefill"):
                    model.prefill(tokens)
                result.timed += len(batch.questions)
            for name, seconds in watch.seconds.items():
                result.seconds[name] = result.seconds.get(name, 0.0) + seconds
            scores, language = count_flops(partial(model, tokens, batch.question_ids)) if not first else (None, 0)
            if scores is None:
                scores = model(tokens, batch.question_ids)
            else:  # operations of a clip hardly vary, so one batch is counted
                result.module, result.language, result.counted = count_flops(reduce)[1], language, len(batch.questions)
            result.tokens += [usage.used for usage in tokens.usage]
            for questions, right in zip(batch.questions, (scores.argmax(-1) == batch.answer_ids).tolist(), strict=True):
                for question, hit in zip(questions, right, strict=True):
                    result.right[question.kind].append(hit)
    return results, shared.seconds


def _reduce(reducer: TokenReducer | None, tokens: TokenBatch, budget: TokenBudget) -> TokenBatch:
    return tokens if reducer is None else reducer.reduce(tokens, budget)


def _batches(clips: SyntheticClips, size: int, patch_size: int, watch: Stopwatch) -> Iterator[ClipBatch]:
    for start in range(0, len(clips), size):
        with watch.measure("draw"):
            items = [clips[number] for number in range(start, min(start + size, len(clips)))]
        yield collate(items, patch_size)


def accuracy_table(rows: Sequence[Method], runs: Sequence[Sequence[Measured]]) -> Table:
    """One line a method: tokens, accuracy, density, work and time."""
    full = mean_and_interval([run[0].accuracy for run in runs])[0]
    lines: list[tuple[Cell, ...]] = []
    for i, row in enumerate(rows):
        done = [run[i] for run in runs]
        accuracy, sure = mean_and_interval([result.accuracy for result in done])
        tokens = sum(result.mean_tokens for result in done) / len(done)
        clips = sum(len(result.tokens) for result in done)
        counted = sum(result.counted for result in done)
        lines.append(
            (
                row.name,
                _budget(row),
                tokens,
                accuracy,
                sure,
                100 * accuracy / full if full else None,
                accuracy / tokens,
                sum(result.module for result in done) / counted / 1e6,
                sum(result.language for result in done) / counted / 1e6,
                1000 * sum(result.seconds["reduce"] for result in done) / clips,
                1000 * sum(result.seconds["prefill"] for result in done) / sum(result.timed for result in done),
            )
        )
    return Table(
        title="Accuracy against tokens",
        columns=(
            *("method", "budget", "tokens", "accuracy %", "+-", "% of all tokens' accuracy", "density %/token"),
            *("reducer MFLOP", "language model MFLOP", "reduce ms", "prefill ms"),
        ),
        rows=tuple(lines),
        note="Means over seeds, and half the width of Student's 95 % interval. Tokens: of a clip, all that the "
        "language model reads; there is no newline row. MFLOP: matrix products, of a clip; the language model's with "
        "its questions. ms: wall clock of a clip, in batches.",
    )


def _budget(row: Method) -> str:
    if row.budget.max_tokens is None:
        return "-"
    error = row.budget.target_error
    return str(row.budget.max_tokens) if error is None else f"error {error:g}, at most {row.budget.max_tokens}"


def kinds_table(rows: Sequence[Method], runs: Sequence[Sequence[Measured]], count: int) -> Table:
    """Accuracy by kind of question: all tokens, and each method at `count`."""
    lines: list[tuple[Cell, ...]] = []
    for i, row in enumerate(rows):
        if row.reducer is not None and (row.budget.max_tokens != count or row.budget.target_error is not None):
            continue
        answers = {kind: [right for run in runs for right in run[i].right[kind]] for kind in KINDS}
        lines.append((row.name, *(100 * sum(right) / max(len(right), 1) for right in answers.values())))
    return Table(title=f"Accuracy by kind of question, {count} tokens", columns=("method", *KINDS), rows=tuple(lines))


def blind_table(train: Sequence[Question], test: Sequence[Question]) -> Table:
    """Accuracy without the clip."""
    majority, text = blind_accuracy(train, test)
    return Table(
        title="Without the clip",
        columns=("guess", "accuracy %"),
        rows=(("most frequent answer of the kind", 100 * majority), ("most frequent answer to the text", 100 * text)),
        note=f"The most frequent answers of {len(train):,} questions about training scenes.",
    )


def time_table(shared: dict[str, float], clips: int) -> Table:
    """The steps that all methods share."""
    return Table(
        title="Time of a clip before reduction",
        columns=("step", "ms"),
        rows=tuple((name, 1000 * seconds / clips) for name, seconds in shared.items()),
        note="Frames are drawn here; for files, decoding takes the place of drawing (--clips measures it).",
    )


def plot(rows: Sequence[Method], runs: Sequence[Sequence[Measured]]) -> Figure:
    """Accuracy against tokens, a line a method."""
    figure, axes = new_figure()
    lines: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for i, row in enumerate(rows):
        tokens = sum(run[i].mean_tokens for run in runs) / len(runs)
        lines[row.name].append((tokens, *mean_and_interval([run[i].accuracy for run in runs])))
    for name, points in lines.items():
        counts, accuracy, sure = zip(*sorted(points), strict=True)
        bars = [width if width < 100 else 0.0 for width in sure]
        if name == FULL:
            axes.axhline(accuracy[0], color="black", linestyle=":", label=f"{name} ({counts[0]:.0f})")
        else:
            bold = 2.5 if name in (OURS, ADAPTIVE) else 1.0
            axes.errorbar(counts, accuracy, yerr=bars, marker="o", capsize=2, linewidth=bold, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a clip")
    axes.set_ylabel("accuracy on synthetic questions, %")
    axes.legend()
    return figure


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures a model and writes the report.

    Args:
        arguments: as `command` reads them.
        argv: the same as text, for the report.

    Returns:
        0.

    Raises:
        ValueError, OSError, MissingExtraError: something could not be read.
    """
    counts = COUNTS if arguments.tokens is None else arguments.tokens
    fixed = FIXED if arguments.fixed is None else arguments.fixed
    errors = ERRORS if arguments.errors is None else arguments.errors
    model = VideoAnswerer.from_pretrained(arguments.model, revision=arguments.revision)
    backgrounds = read_backgrounds(arguments.data / arguments.part)
    more, plots, remarks = list[Table](), dict[str, "Figure"](), list[str]()
    if arguments.clips is not None:  # first, so that a wrong folder is noticed before the long part
        more, plots, remarks = report(
            arguments.clips, AnswererEncoder(model), arguments.out, counts=counts, errors=errors
        )
    config, rows = model.config, methods(model, counts, errors, fixed)
    clips_of = partial(SyntheticClips, num_frames=config.num_frames, image_size=config.image_size)
    runs, questions, seconds = list[list[Measured]](), list[Question](), defaultdict[str, float](float)
    for seed in range(arguments.seeds):
        clips = clips_of(arguments.part, arguments.count, backgrounds, seed=seed)
        questions += [question for number in range(len(clips)) for question in clips.questions_of(number)]
        results, shared = measure(model, clips, rows, seed)
        runs.append(results)
        for name, spent in shared.items():
            seconds[name] += spent
    scenes = clips_of("train", 4000, seed=0)
    known = [question for number in range(len(scenes)) for question in scenes.questions_of(number)]
    tables = [accuracy_table(rows, runs)]
    tables += [kinds_table(rows, runs, count) for count in counts if count == 32]
    tables += [blind_table(known, questions), time_table(seconds, arguments.seeds * arguments.count)]
    write_report(
        arguments.out,
        title="VQToken on synthetic video questions",
        settings={
            "model": str(arguments.model),
            "part": arguments.part,
            "seeds": arguments.seeds,
            "clips a seed": arguments.count,
            "questions a clip": len(questions) // (arguments.seeds * arguments.count),
            "native tokens": config.grid[0] * config.grid[1] * config.grid[2],
            "threads": torch.get_num_threads(),
            "command": "tokenthrift evaluate vqtoken " + " ".join(argv),
        },
        tables=[*tables, *more],
        figures={"accuracy": plot(rows, runs), **plots},
        notes=[_NOTE, *remarks],
    )
    accuracies = [sum(run[i].accuracy for run in runs) / len(runs) / 100 for i in range(len(rows))]
    points = [
        (row.budget.max_tokens, accuracy)
        for row, accuracy in zip(rows, accuracies, strict=True)
        if row.name == OURS and row.budget.max_tokens is not None
    ]
    curve = measured_curve(
        points,
        kind="video",
        metric="share of right answers",
        data=f"synthetic questions, {arguments.part} part",
        command="tokenthrift evaluate vqtoken " + " ".join(argv),
    )
    save_curves(arguments.model, arguments.out, [curve])
    print((arguments.out / "report.md").read_text(encoding="utf-8"))
    return 0
