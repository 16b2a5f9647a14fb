"""`tokenthrift tokenize`: files to tokens under a budget.

One JSON object a file goes to stdout or to `--out`, in the order of the files, and a summary to stderr. A file that
cannot be read is named on stderr, has a line with `failed` instead of figures, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokenthrift.commands.arguments import (
    BUDGETS,
    DONE,
    FAILED,
    WRONG_USAGE,
    add_any_suffix,
    add_model_option,
    count,
    fail,
    make_parser,
    working_device,
)

if TYPE_CHECKING:
    from tokenthrift.tokenize import FileTokenizer

__all__ = ["main"]

_EPILOG = f"""\
{BUDGETS}

exit status: 0 done, 1 some files failed and are named on stderr, 2 wrong usage"""


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = _parser()
    # Which options there are depends on the model, so its name is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    first.add_argument("--revision")
    named = first.parse_known_args(argv)[0]
    if named.model is None:
        parser.parse_args(argv)  # shows the help, or what is wrong, and ends
    try:
        reader = _reader(named.model, named.revision)
        reader.add_options(parser)
        arguments = parser.parse_args(argv)
        from tokenthrift.budget import TokenBudget
        from tokenthrift.media.files import find_files
        from tokenthrift.models import load
        from tokenthrift.tokenize import token_rows

        budget = TokenBudget.parse(arguments.budget)
        files = find_files(arguments.input, reader.suffixes, reader.noun, any_suffix=arguments.any_suffix)
        if remark := files.remark("name them or use --any-suffix"):
            print(remark, file=sys.stderr)
        paths = [found.path for found in files]
        model = load(arguments.model, revision=arguments.revision, device=working_device(arguments.device))
        rows = token_rows(reader(model, arguments), paths, budget, arguments.batch_size)  # type: ignore[call-arg]
        with ExitStack() as stack:
            out = stack.enter_context(arguments.out.open("w", encoding="utf-8")) if arguments.out else sys.stdout
            return _write(out, rows, reader.noun)
    except (OSError, ValueError, ImportError) as error:
        return fail("tokenize", error, WRONG_USAGE)


def _reader(source: str, revision: str | None) -> type[FileTokenizer]:
    """What the system of a model does with files.

    Raises:
        ConfigError: it makes no tokens of files.
    """
    from tokenthrift.config import ConfigError
    from tokenthrift.hub import CONFIG
    from tokenthrift.models import model_class
    from tokenthrift.sources import fetch
    from tokenthrift.tokenize import planner_class

    kind = model_class(fetch(source, (CONFIG,), revision=revision))
    reader: Any = planner_class(kind, source)
    if not hasattr(reader, "tokenize"):
        raise ConfigError(f"{source}: a model of {kind.__name__} makes no tokens of files")
    return reader  # type: ignore[no-any-return]


def _write(out: TextIO, rows: Iterator[dict[str, Any]], noun: str) -> int:
    """Writes every row as soon as it is known; the exit code."""
    done = broken = native = tokens = 0
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        out.flush()
        if "failed" in row:
            broken += 1
            print(f"failed: {row['file']}: {row['failed']}", file=sys.stderr)
        else:
            done, native, tokens = done + 1, native + row["native"], tokens + row["tokens"]
    if done:
        share = f", {tokens / done:.1f} each, {tokens / native:.0%} of {native:,} native" if native else ""
        print(f"{done} {noun}{'s' if done > 1 else ''}: {tokens:,} tokens{share}", file=sys.stderr)
    if broken:
        print(f"{broken} failed", file=sys.stderr)
    return FAILED if broken else DONE


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "tokenize",
        "Turn files into tokens, and say what each cost. Options of a model's own are shown with --model MODEL --help.",
        usage="%(prog)s INPUT... --model MODEL [options]",
        epilog=_EPILOG,
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a file, a folder, or a pattern in quotes")
    add_any_suffix(parser)
    add_model_option(parser)
    parser.add_argument("--budget", metavar="B", help="ceilings for each file (default: none)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON lines go (default: stdout)")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="files at once (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return parser
