"""`tokenthrift evaluate multimodal_lm`: curves of quality against tokens, and accuracy against the total by split.

First the development part: questions about one medium, at several counts of tokens. These curves go into `quality.json`
in the model's folder. Then the test part: prompts of one medium of each kind with a question about one of them, within
totals, shared by value (by those curves), alike, and in proportion to native tokens; and with all native tokens. An
answer is right where the words that the model writes are exactly those of the answer; nothing is chosen from a list.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tokenthrift.commands.arguments import DONE, add_model_option, count, make_parser
from tokenthrift.evaluation.report import Cell, Table, write_report
from tokenthrift.quality import QualityCurve, write_quality
from tokenthrift.window import Split

__all__ = ["main"]

_SPLITS: Final[tuple[Split, ...]] = ("value", "equal", "demand")
_COUNTS: Final = (0, 1, 2, 4, 8, 16, 32, 64)
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
    command = f"tokenthrift evaluate multimodal_lm --model {arguments.model} --data {arguments.data}"
    command += f" --questions {arguments.questions} --prompts {arguments.prompts} --seed {arguments.seed}"
    curves, tables = measure_curves(model, dev, arguments.questions, arguments.seed, command)
    if Path(arguments.model).is_dir():
        write_quality(Path(arguments.model), curves)
    tables += measure_splits(model, test, {c.kind: c for c in curves}, arguments.prompts, arguments.seed)
    settings: dict[str, Cell] = {"model": str(arguments.model), "data": str(arguments.data), "seed": arguments.seed}
    settings |= {"questions a curve": arguments.questions, "test prompts": arguments.prompts, "command": command}
    write_report(arguments.out, title="Accuracy against tokens in one window", settings=settings, tables=tables)
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
        counts = [n for n in _COUNTS if n < native]
        rights: list[float] = []
        for n in counts:
            prompts: list[Any] = [prompt_of(e) for e in examples]
            if n == 0:  # what the question alone gives away
                prompts = [[part for part in prompt if isinstance(part, str)] for prompt in prompts]
            rights.append(_share(_right(model, prompts, examples, budget=n or None)))
        curves.append(
            QualityCurve(
                tokens=tuple(counts),
                quality=tuple(round(share, 4) for share in rights),
                kind=kind,
                metric="share of right answers",
                data=f"{len(examples)} questions of the development part",
                command=command,
            )
        )
        rows = tuple((n, round(share, 4)) for n, share in zip(counts, rights, strict=True))
        tables.append(Table(title=f"Development: {kind}", columns=("tokens", "accuracy"), rows=rows))
        print(kind, dict(rows), flush=True)
    return curves, tables


def measure_splits(model: Any, test: Any, curves: dict[str, QualityCurve], prompts: int, seed: int) -> list[Table]:
    """Accuracy on prompts with one medium of every kind, by total and by split; and with all native tokens."""
    from tokenthrift.multimodal_lm.prompts import Media
    from tokenthrift.multimodal_lm.questions import Example, prompt_of

    kinds = list(model.config.prefixes)
    by_kind = {kind: [i for i, row in enumerate(test.rows) if row["kind"] == kind] for kind in kinds}
    rng = random.Random(seed)
    examples = []
    for i in range(prompts):
        asked = kinds[i % len(kinds)]
        row = test.rows[rng.choice(by_kind[asked])]
        others = {kind: test.rows[rng.choice(by_kind[kind])]["item"] for kind in kinds}
        media = [(kind, test.tokens(kind, (others | {asked: row["item"]})[kind])) for kind in sorted(kinds)]
        examples.append(Example(media, asked, row["task"], row["question"], row["answer"]))
    texts: list[Any] = [prompt_of(example) for example in examples]
    native = sum(len(tokens.positions[0]) for e in examples for _, tokens in e.media) / prompts
    full = _share(_right(model, texts, examples, size=4))
    print(f"native {native:.0f}: {full:.3f}", flush=True)
    rows: list[tuple[Cell, ...]] = []
    for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4):
        total = max(round(native * share), len(kinds))
        cells: list[Cell] = []
        used: list[float] = []
        for split in _SPLITS:
            budgets = []
            for prompt in texts:
                media_only = [part for part in prompt if isinstance(part, Media)]
                plan = model.window(media_only, total, split=split, curves=curves)
                budgets.append({p.item.kind: p.budget for p in plan.items})
                used.append(plan.used if split == "value" else 0)
            cells.append(round(_share(_right(model, texts, examples, budget=budgets)), 4))
        spent = sum(used) / prompts
        rows.append((f"1/{round(1 / share)}", total, *cells, round(spent, 1)))
        print(rows[-1], flush=True)
    splits = tuple(f"by {split}" for split in _SPLITS)
    note = f"{prompts} prompts with one medium of each kind, a question about one of them; demand is native tokens."
    columns = ("of native", "total", *splits, "used by value")
    whole = Table(
        title="Test: all native tokens", columns=("tokens", "accuracy"), rows=((round(native), round(full, 4)),)
    )
    return [whole, Table(title="Test: accuracy by total and split", columns=columns, rows=tuple(rows), note=note)]


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
