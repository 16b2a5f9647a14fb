"""`tokenthrift evaluate multimodal_lm`: curves of quality against tokens, and accuracy against the total by split.

First the development part: questions about one medium, at several counts of tokens. These curves go into `quality.json`
in the model's folder. Then the test part: prompts of one medium of each kind with a question about one of them, within
totals, shared by value (by those curves), alike, and in proportion to native tokens; and with all native tokens. An
answer is right where the words that the model writes are exactly those of the answer; nothing is chosen from a list.
The same prompts are read under every split, so differences are paired: their intervals are over prompts.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenthrift.commands.arguments import DONE, add_model_option, count, make_parser
from tokenthrift.evaluation.report import Cell, Table, new_figure, write_report
from tokenthrift.quality import QualityCurve, save_curves
from tokenthrift.window import Split

__all__ = ["main"]

_SPLITS: Final[tuple[Split, ...]] = ("value", "equal", "demand")
_COUNTS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_SHARES: Final = (64, 32, 16, 8, 4)
"""Of native tokens: one over."""
_ANSWER: Final = 4


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    arguments = _parser().parse_args(argv)
    from tokenthrift.multimodal_lm.model import MultimodalLM
    from tokenthrift.multimodal_lm.questions import Questions

    model = MultimodalLM.from_pretrained(
        arguments.model, revision=arguments.revision, language_model=arguments.language_model
    )
    grids = {"video": tuple(arguments.grid)} if arguments.grid else None
    dev, test = (Questions(arguments.data / part, grids=grids) for part in ("dev", "test"))
    command = "tokenthrift evaluate multimodal_lm " + " ".join(argv)
    curves, tables = measure_curves(model, dev, arguments.questions, arguments.seed, command)
    tables += measure_splits(model, test, {c.kind: c for c in curves}, arguments.prompts, arguments.seed)
    settings: dict[str, Cell] = {"model": str(arguments.model), "data": str(arguments.data), "seed": arguments.seed}
    settings |= {"questions a curve": arguments.questions, "test prompts": arguments.prompts, "command": command}
    write_report(
        arguments.out,
        title="Accuracy against tokens in one window",
        settings=settings,
        tables=tables,
        figures={"window": draw(curves, tables[-1])},
    )
    save_curves(arguments.model, arguments.out, curves)
    return DONE


def measure_curves(
    model: Any, dev: Any, questions: int, seed: int, command: str
) -> tuple[list[QualityCurve], list[Table]]:
    """Accuracy at counts of tokens for each kind, on questions about one medium.

    Args:
        model: a `MultimodalLM`.
        dev: `Questions` of the development part.
        questions: about each kind.
        seed: of which ones.
        command: what the curves say of themselves.
    """
    from tokenthrift.multimodal_lm.questions import prompt_of

    curves, tables = [], []
    for kind in model.config.prefixes:
        numbers = [i for i, row in enumerate(dev.rows) if row["kind"] == kind]
        examples = [dev[i] for i in _drawn(numbers, questions, seed)]
        native = max(len(tokens.positions[0]) for e in examples for _, tokens in e.media)
        counts = [*(n for n in _COUNTS if n < native), native]
        found: list[list[bool]] = []
        for n in counts:
            prompts: list[Any] = [prompt_of(e) for e in examples]
            if n == 0:  # what the question alone gives away
                prompts = [[part for part in prompt if isinstance(part, str)] for prompt in prompts]
            found.append(_right(model, prompts, examples, budget=n or None))
        curves.append(
            QualityCurve(
                tokens=tuple(counts),
                quality=tuple(round(_share(hits), 4) for hits in found),
                kind=kind,
                metric="share of right answers",
                data=f"{len(examples)} questions of the development part",
                command=command,
            )
        )
        tasks = sorted({e.task for e in examples})
        rows = tuple(
            (n, round(_share(hits), 4), *(round(_share(_of(task, hits, examples)), 4) for task in tasks))
            for n, hits in zip(counts, found, strict=True)
        )
        tables.append(Table(title=f"Development: {kind}", columns=("tokens", "accuracy", *tasks), rows=rows))
        print(kind, {row[0]: row[1] for row in rows}, flush=True)
    return curves, tables


def measure_splits(model: Any, test: Any, curves: dict[str, QualityCurve], prompts: int, seed: int) -> list[Table]:
    """Accuracy on prompts with one medium of every kind, by total and by split; and with all native tokens."""
    from tokenthrift.multimodal_lm.prompts import Media
    from tokenthrift.multimodal_lm.questions import prompt_of

    kinds = list(model.config.prefixes)
    examples = _with_all_media(test, kinds, prompts, seed)
    texts: list[Any] = [prompt_of(example) for example in examples]
    native = sum(len(tokens.positions[0]) for e in examples for _, tokens in e.media) / len(examples)
    full = _right(model, texts, examples, size=4)
    tasks = sorted({e.task for e in examples})
    whole = Table(
        title="Test: all native tokens",
        columns=("tokens", "accuracy", *tasks),
        rows=((round(native), round(_share(full), 4), *(round(_share(_of(t, full, examples)), 4) for t in tasks)),),
    )
    print(whole.rows[0], flush=True)
    rows: list[tuple[Cell, ...]] = []
    for share in _SHARES:
        total = max(round(native / share), len(kinds))
        right: dict[str, list[bool]] = {}
        used = 0
        for split in _SPLITS:
            budgets = []
            for prompt in texts:
                media_only = [part for part in prompt if isinstance(part, Media)]
                plan = model.window(media_only, total, split=split, curves=curves)
                budgets.append({p.item.kind: p.budget for p in plan.items})
                used += plan.used if split == "value" else 0
            right[split] = _right(model, texts, examples, budget=budgets)
        cells = [round(_share(right[split]), 4) for split in _SPLITS]
        differences = [_difference(right["value"], right[split]) for split in ("equal", "demand")]
        kept = f"{100 * _share(right['value']) / max(_share(full), 1e-9):.1f} %"
        spent = round(used / len(examples), 1)
        rows.append((f"1/{share}", total, *cells, *differences, kept, _difference(right["value"], full), spent))
        print(rows[-1], flush=True)
    columns = ("of native", "total", *(f"by {split}" for split in _SPLITS), "value - equal", "value - demand")
    columns += ("value keeps", "value - all", "used by value")
    note = (
        f"{len(examples)} prompts with one medium of each kind, a question about one of them; demand is native tokens. "
    )
    note += "Differences in points, with 95 % intervals over prompts (bootstrap)."
    return [whole, Table(title="Test: accuracy by total and split", columns=columns, rows=tuple(rows), note=note)]


def draw(curves: Sequence[QualityCurve], splits: Table) -> Any:
    """Left, quality against tokens of each kind with the hull; right, accuracy against the total by split."""
    figure, (left, right) = new_figure(9, 3.6, ncols=2)
    for curve in curves:
        (line,) = left.plot(curve.tokens, curve.quality, "o", ms=4, label=curve.kind)
        left.plot(*zip(*curve.hull(), strict=True), color=line.get_color())
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="tokens of the item", ylabel="share of right answers", title="development: one medium", ylim=(0, 1))
    left.legend(frameon=False)
    totals = [row[1] for row in splits.rows]
    for i, split in enumerate(_SPLITS):
        right.plot(totals, [row[2 + i] for row in splits.rows], "o-", ms=4, label=f"by {split}")
    right.set_xscale("log", base=2)
    right.set_xticks(totals, [str(total) for total in totals])
    right.set(xlabel="tokens of all three media", title="test: three media in one window", ylim=(0, 1))
    right.legend(frameon=False)
    return figure


def _with_all_media(test: Any, kinds: Sequence[str], prompts: int, seed: int) -> list[Any]:
    """Prompts with one medium of each kind; the kinds are asked about in turn, each question at most once."""
    from tokenthrift.multimodal_lm.questions import Example

    rng = random.Random(seed)
    numbers = {kind: [i for i, row in enumerate(test.rows) if row["kind"] == kind] for kind in kinds}
    each = min(-(-prompts // len(kinds)), *(len(own) for own in numbers.values()))
    examples = []
    for asked in kinds:
        for i in rng.sample(numbers[asked], each):
            row = test.rows[i]
            items = {kind: test.rows[rng.choice(numbers[kind])]["item"] for kind in kinds} | {asked: row["item"]}
            media = [(kind, test.tokens(kind, items[kind])) for kind in sorted(kinds)]
            examples.append(Example(media, asked, row["task"], row["question"], row["answer"]))
    return examples


def _difference(ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    """In points, with its 95 % interval over the prompts that both answered."""
    from tokenthrift.evaluation.statistics import bootstrap_interval

    points = [100.0 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if len(set(points)) == 1:
        return f"{points[0]:+.1f}"
    mean, low, high = bootstrap_interval(points)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _of(task: str, right: Sequence[bool], examples: Sequence[Any]) -> list[bool]:
    return [hit for hit, example in zip(right, examples, strict=True) if example.task == task]


def _right(
    model: Any, prompts: Sequence[Any], examples: Sequence[Any], *, budget: Any = None, size: int = 25
) -> list[bool]:
    """Whether each answer is exactly right."""
    found: list[bool] = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        own = budget[part] if isinstance(budget, list) else budget
        answers = model.answer(prompts[part], own, max_new_tokens=_ANSWER)
        found += [a.text == e.answer for a, e in zip(answers, examples[part], strict=True)]
    return found


def _share(right: Sequence[bool]) -> float:
    return sum(right) / max(len(right), 1)


def _drawn(numbers: Sequence[int], most: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(list(numbers), min(most, len(numbers))))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "evaluate multimodal_lm",
        "Measure quality against tokens for each kind of media (written to quality.json in the model's folder), and\n"
        "accuracy in one window by how its total is shared.",
    )
    add_model_option(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes/multimodal/features.py")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes")
    parser.add_argument("--language-model", metavar="M", help="folder or Hub id, in place of the one the model names")
    parser.add_argument("--questions", type=count, default=150, help="development questions a kind (default: 150)")
    parser.add_argument("--prompts", type=count, default=150, help="test prompts (default: 150)")
    parser.add_argument(
        "--grid", type=count, nargs=3, metavar="N", help="frames, rows and columns of clips (default: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of which questions (default: 0)")
    return parser
