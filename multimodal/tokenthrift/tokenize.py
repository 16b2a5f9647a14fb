"""`tokenthrift tokenize` and `tokenthrift plan`: files to tokens, and what they will cost before anything runs.

Both write one JSON object a file, to stdout or to `--out`, in the order of the files, and a summary to stderr. A file
that cannot be read is named on stderr, has a line with `failed` instead of figures, and the others go on. What a file
is and which options a model has besides is its system's business: a `FileTokenizer`, named in `cli.FILE_TOKENIZERS`.

`plan` builds the model without memory and reads only the headers of files, so it is fast whatever the model's size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from tokenthrift.budget import BudgetError, TokenBudget, TokenUsage
from tokenthrift.cli import FILE_TOKENIZERS, load
from tokenthrift.config import ConfigError
from tokenthrift.hub import CONFIG, HubModel, read_config
from tokenthrift.media.files import find_files
from tokenthrift.models import model_class
from tokenthrift.sources import fetch, is_folder

__all__ = ["FileTokenizer", "plan", "tokenize"]

_EPILOG = """\
budgets: 64 (tokens), 25% (of the native ones), 12.5/s, e0.05 (wanted error), or
  several joined by commas: 64,e0.05

exit status: 0 done, 1 some files failed and are named on stderr, 2 wrong usage"""


class FileTokenizer(Protocol):
    """What a system does with the files of its medium; made of a model and the parsed options.

    Attributes:
        noun: what a file is called, in the singular.
        suffixes: under which such files are looked for in folders.
    """

    noun: str
    suffixes: frozenset[str]

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Adds the system's own options of `tokenize`."""

    def plan(self, path: Path, budget: TokenBudget) -> TokenUsage:
        """What a file will cost at most, from its header; the model has no memory here.

        Raises:
            ValueError: The file cannot be read (an error of `tokenthrift.media`).
            BudgetError: The budget cannot be honoured.
        """

    def read(self, path: Path) -> Any:
        """Reads a file.

        Raises:
            ValueError: It cannot be read.
        """

    def tokenize(self, items: Sequence[Any], budget: TokenBudget) -> list[dict[str, Any]]:
        """Plain figures for each item, `usage_row` first, then what the system adds.

        Args:
            items: What `read` gave.
            budget: Ceilings for each of them.
        """


def usage_row(usage: TokenUsage) -> dict[str, Any]:
    """The figures that every system reports."""
    row: dict[str, Any] = {"native": usage.native, "cap": usage.cap, "tokens": usage.used}
    return row if usage.error is None else {**row, "error": round(usage.error, 6)}


def tokenize(argv: Sequence[str]) -> int:
    """Runs `tokenthrift tokenize`."""
    parser = _parser("tokenize", "Turn files into tokens, and say what each cost.")
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="files at once (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return _run("tokenize", parser, argv)


def plan(argv: Sequence[str]) -> int:
    """Runs `tokenthrift plan`."""
    return _run("plan", _parser("plan", "Say what files will cost at most, before anything is computed."), argv)


def _run(command: str, parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    # Which options there are depends on the model, so its name is read first.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    source = first.parse_known_args(argv)[0].model
    if source is None:
        source = parser.parse_args(argv).model  # shows the help, or what is wrong, and ends
    try:
        kind = model_class(fetch(source, (CONFIG,)))
        if kind.system not in FILE_TOKENIZERS:
            raise ConfigError(f"{source}: a model of {kind.__name__} makes no tokens of files")
        tokenizer_class = load(FILE_TOKENIZERS[kind.system])
        tokenizer_class.add_options(parser)
        arguments = parser.parse_args(argv)
        budget = TokenBudget.parse(arguments.budget)
        files = find_files(
            arguments.input, tokenizer_class.suffixes, tokenizer_class.noun, any_suffix=arguments.any_suffix
        )
        if remark := files.remark("name them or use --any-suffix"):
            print(remark, file=sys.stderr)
        paths = [found.path for found in files]
        if command == "plan":
            tokenizer = tokenizer_class(_weightless(source, kind), arguments)
            rows = _plans(tokenizer, paths, budget)
        else:
            tokenizer = tokenizer_class(kind.from_pretrained(source, device=_device(arguments.device)), arguments)
            rows = _tokens(tokenizer, paths, budget, arguments.batch_size)
        with ExitStack() as stack:
            out = stack.enter_context(arguments.out.open("w", encoding="utf-8")) if arguments.out else sys.stdout
            return _write(out, rows, tokenizer.noun)
    except (OSError, ValueError, ImportError) as error:
        print(f"tokenthrift {command}: {error}", file=sys.stderr)
        return 2


def _weightless(source: str, kind: type[HubModel]) -> HubModel:
    """The model on the meta device: its configuration can be asked, and nothing else."""
    folder = fetch(source, (CONFIG,))
    fetch(source, kind.asset_files, revision=None if is_folder(source) else folder.name)
    with torch.device("meta"):
        return kind(read_config(folder, kind), **kind.read_assets(folder))


def _plans(tokenizer: FileTokenizer, paths: Sequence[Path], budget: TokenBudget) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            usage = tokenizer.plan(path, budget)
        except BudgetError:
            raise
        except ValueError as error:
            yield _failed(path, error)
        else:
            yield {"file": str(path), "native": usage.native, "cap": usage.cap}


def _tokens(
    tokenizer: FileTokenizer, paths: Sequence[Path], budget: TokenBudget, batch: int
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(paths), batch):
        rows: dict[Path, dict[str, Any]] = {}
        items = []
        for path in paths[start : start + batch]:
            try:
                items.append((path, tokenizer.read(path)))
            except ValueError as error:
                rows[path] = _failed(path, error)
        if items:
            with torch.inference_mode():
                found = tokenizer.tokenize([item for _, item in items], budget)
            rows |= {path: {"file": str(path), **row} for (path, _), row in zip(items, found, strict=True)}
        yield from (rows[path] for path in paths[start : start + batch])


def _failed(path: Path, error: ValueError) -> dict[str, Any]:
    return {"file": str(path), "failed": getattr(error, "reason", None) or str(error)}


def _write(out: TextIO, rows: Iterator[dict[str, Any]], noun: str) -> int:
    """Writes every row as soon as it is known; the exit code."""
    done = failed = native = tokens = 0
    planned = False
    for row in rows:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
        out.flush()
        if "failed" in row:
            failed += 1
            print(f"failed: {row['file']}: {row['failed']}", file=sys.stderr)
        else:
            done, native, planned = done + 1, native + row["native"], "tokens" not in row
            tokens += row["cap"] if planned else row["tokens"]
    if done:
        share = f", {tokens / done:.1f} each, {tokens / native:.0%} of {native:,} native" if native else ""
        print(
            f"{done} {noun}{'s' if done > 1 else ''}: {'at most ' if planned else ''}{tokens:,} tokens{share}",
            file=sys.stderr,
        )
    if failed:
        print(f"{failed} failed", file=sys.stderr)
    return 1 if failed else 0


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"tokenthrift {command}",
        usage="%(prog)s INPUT... --model MODEL [options]",
        description=f"{description} Options of a model's own are shown with --model MODEL --help.",
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        allow_abbrev=False,
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a file, a folder, or a pattern in quotes")
    parser.add_argument("--model", required=True, help="a model folder, or owner/name on the Hugging Face Hub")
    parser.add_argument("--budget", default="100%", help="ceilings for each file (default: all native tokens)")
    parser.add_argument(
        "--any-suffix", action="store_true", help="in folders, also take files by their content, whatever their suffix"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON lines go (default: stdout)")
    return parser


def _device(wanted: str | None) -> str:
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {wanted}: {str(error).splitlines()[0]}") from error
    return wanted


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
