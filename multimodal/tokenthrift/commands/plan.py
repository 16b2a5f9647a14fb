"""`tokenthrift plan`: the tokens of pictures, clips, recordings and talking videos, before anything runs.

Models are built without memory, and of files only the headers are read, so it is fast whatever the size of either. A
folder may hold files of every kind: each model counts those that it reads; what no model reads is named as left out,
and what holds no medium is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenthrift.commands.arguments import (
    BUDGETS,
    DONE,
    FAILED,
    WRONG_USAGE,
    add_any_suffix,
    add_model_option,
    fail,
    make_parser,
)
from tokenthrift.commands.plan_prompt import is_prompt
from tokenthrift.commands.plan_prompt import main as plan_prompt

if TYPE_CHECKING:
    from tokenthrift.budget import BudgetSupport, TokenBudget
    from tokenthrift.tokenize import FilePlanner

__all__ = ["main"]

_EPILOG = f"""\
{BUDGETS}

examples:
  tokenthrift plan photos/ --model model_cards/karl-tiny-64 --budget 16
  tokenthrift plan media/ --model owner/video --model owner/speech --json
  tokenthrift plan PROMPT.yaml --context 2048 # one window over many media; see plan PROMPT.yaml --help

exit status: 0 done, 1 some files failed and are named on stderr, 2 wrong usage"""


@dataclass(frozen=True, slots=True)
class _Model:
    """A model as it was named, and what it does with files."""

    name: str
    planner: FilePlanner


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    if is_prompt(argv):
        return plan_prompt(argv)
    parser = _parser()
    # Which options there are depends on the models, so their names are read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", action="append")
    first.add_argument("--revision")
    named = first.parse_known_args(argv)[0]
    if not named.model:
        parser.parse_args(argv)  # shows the help, or what is wrong, and ends
    try:
        from tokenthrift.budget import TokenBudget
        from tokenthrift.media.files import find_files
        from tokenthrift.media.suffixes import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES
        from tokenthrift.models import find
        from tokenthrift.sources import is_folder
        from tokenthrift.tokenize import planner_class

        names = list(dict.fromkeys(named.model))
        # A folder has no revisions; of several models those on the Hub are meant.
        of = {name: None if len(names) > 1 and is_folder(name) else named.revision for name in names}
        found = [(find(name, revision=of[name]), name) for name in names]
        kinds = [planner_class(type(each.model), name) for each, name in found]
        for kind in dict.fromkeys(kinds):
            kind.add_options(parser)
        arguments = parser.parse_args(argv)
        budget = TokenBudget.parse(arguments.budget)
        models = []
        for kind, (each, name) in zip(kinds, found, strict=True):
            options = argparse.Namespace(**{**vars(arguments), "model": name, "folder": each.folder})
            planner: FilePlanner = kind(each.model, options)  # type: ignore[call-arg]
            support: BudgetSupport = each.model.support  # type: ignore[assignment]
            support.check(budget)
            models.append(_Model(name, planner))
        everything = IMAGE_SUFFIXES | MEDIA_SUFFIXES | VIDEO_SUFFIXES
        files = find_files(arguments.input, everything, "picture, clip or recording", any_suffix=arguments.any_suffix)
        if remark := files.remark("name them or use --any-suffix"):
            print(remark, file=sys.stderr)
        if files.others:
            print(f"{files.others} other file{'s' * (files.others > 1)} without picture or sound", file=sys.stderr)
        paths = [file.path for file in files]
        rows = list(_rows(models, paths, budget))
    except (OSError, ValueError, ImportError) as error:
        return fail("plan", error, WRONG_USAGE)
    if arguments.out is not None:
        arguments.out.write_text(_lines(rows), encoding="utf-8")
    elif arguments.json:
        print(_lines(rows), end="")
    else:
        _print_table(rows, len(models) > 1)
    return _summary(rows, models)


def _rows(models: Sequence[_Model], paths: Sequence[Path], budget: TokenBudget) -> Iterator[dict[str, Any]]:
    """The figures of every file for every model that reads it, or why it failed; `left_out` where no model reads it."""
    from tokenthrift.tokenize import NotRead, reason_of

    for path in paths:
        file, read, reasons = {"file": str(path)}, False, []
        for model in models:
            row: dict[str, Any] = {**file, "model": model.name}
            try:
                _check_suffix(path, model.planner)
                usage = model.planner.plan(path, budget)
            except NotRead as error:
                reasons.append(str(error))
                continue
            except ValueError as error:
                yield {**row, "failed": reason_of(error)}
            else:
                yield {**row, "native": usage.native, "cap": usage.cap}
            read = True
        if not read:
            only = {"model": models[0].name} if len(models) == 1 else {}
            yield {**file, **only, "left_out": "; ".join(dict.fromkeys(reasons))}


def _check_suffix(path: Path, planner: FilePlanner) -> None:
    """Raises NotRead where a file is of a known kind that the model does not read; others are tried."""
    from tokenthrift.media.suffixes import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES
    from tokenthrift.tokenize import NotRead

    suffix = path.suffix.lower()
    for suffixes, noun in ((IMAGE_SUFFIXES, "picture"), (VIDEO_SUFFIXES, "video"), (MEDIA_SUFFIXES, "recording")):
        if suffix in suffixes and suffix not in planner.suffixes:
            raise NotRead(f"a {noun}; the model reads {planner.noun}s")


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _print_table(rows: Sequence[dict[str, Any]], several: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    if several:
        table.add_column("model", overflow="fold")
    table.add_column("native", justify="right")
    table.add_column("at most", justify="right")
    for row in rows:
        names = [Text(row["file"]), *([Text(row.get("model", ""))] if several else [])]
        if "cap" in row:
            table.add_row(*names, f"{row['native']:,}", f"{row['cap']:,}")
        else:
            table.add_row(*names, "", "failed" if "failed" in row else "left out")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _summary(rows: Sequence[dict[str, Any]], models: Sequence[_Model]) -> int:
    """Says what failed, what was left out and what each model's files cost together; the exit code."""
    for word in ("failed", "left_out"):
        for row in rows:
            if word in row:
                who = f" ({row['model']})" if len(models) > 1 and "model" in row else ""
                print(f"{word.replace('_', ' ')}: {row['file']}{who}: {row[word]}", file=sys.stderr)
    for model in models:
        counted = [row for row in rows if "cap" in row and row["model"] == model.name]
        native, cap = (sum(row[name] for row in counted) for name in ("native", "cap"))
        if not counted:
            continue
        noun = model.planner.noun
        who = f"{model.name}: " if len(models) > 1 else ""
        share = f", {cap / len(counted):.1f} each, {cap / native:.0%} of {native:,} native" if native else ""
        many = "s" if len(counted) > 1 else ""
        print(f"{who}{len(counted)} {noun}{many}: at most {cap:,} tokens{share}", file=sys.stderr)
    counts = Counter(word for row in rows for word in ("failed", "left_out") if word in row)
    for word, number in counts.items():
        print(f"{number} {word.replace('_', ' ')}", file=sys.stderr)
    return FAILED if counts["failed"] else DONE


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plan",
        "Say the tokens of pictures, clips, recordings and talking videos at most, before anything is computed.\n"
        "Options of a model's own are shown with --model MODEL --help.",
        usage="%(prog)s INPUT... --model MODEL [--model MODEL ...] [options]",
        epilog=_EPILOG,
        conflict_handler="resolve",  # two systems may have an option of one name
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a file, a folder, or a pattern in quotes")
    add_any_suffix(parser)
    add_model_option(
        parser,
        action="append",
        help="a model folder, or owner/name on the Hugging Face Hub; again for each further model",
    )
    parser.add_argument("--budget", metavar="B", help="ceilings for each file (default: none)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where these lines go instead")
    return parser
