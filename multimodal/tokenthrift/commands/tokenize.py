"""`tokenthrift tokenize`: files to tokens under a budget.

One JSON object an item goes to stdout or to `--out`, shards before loose files and else in the order of the inputs, and
a summary to stderr. An item that cannot be read is named on stderr, has a line with `failed` instead of figures, and
the others go on. Inputs are files, and shards of a collection (WebDataset tars, Parquet tables). With `--out-dir` the
rows go into shards, by a job that survives a crash and that a Ray cluster can do, see `tokenthrift.shards`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokenthrift.commands.arguments import (
    BUDGETS,
    DONE,
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    add_any_suffix,
    add_engine,
    add_model_option,
    count,
    fail,
    make_parser,
)

if TYPE_CHECKING:
    from tokenthrift.shards.units import Unit
    from tokenthrift.shards.work import TokenSpec
    from tokenthrift.tokenize import FileTokenizer

__all__ = ["main"]

_EPILOG = f"""\
{BUDGETS}

exit status: 0 done, 1 some items failed and are named on stderr, 2 wrong usage,
  130 interrupted; what was written until then is complete"""


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
        return _run(arguments, parser, reader)
    except (OSError, ValueError, ImportError) as error:
        return fail("tokenize", error, WRONG_USAGE)


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser, reader: type[FileTokenizer]) -> int:
    from tokenthrift.budget import TokenBudget
    from tokenthrift.media.files import find_files
    from tokenthrift.shards.units import SHARD_SUFFIXES, units_of
    from tokenthrift.shards.work import TokenSpec, Worker

    TokenBudget.parse(arguments.budget)
    own = argparse.ArgumentParser(add_help=False)
    reader.add_options(own)
    options = {"model": arguments.model, **{name: getattr(arguments, name) for name in vars(own.parse_args([]))}}
    files = find_files(
        arguments.input, reader.suffixes, reader.noun, any_suffix=arguments.any_suffix, besides=SHARD_SUFFIXES
    )
    if remark := files.remark("name them or use --any-suffix"):
        print(remark, file=sys.stderr)
    names = {field.name for field in fields(TokenSpec)} - {"options"}
    chosen = {name: value for name, value in vars(arguments).items() if name in names}
    spec = TokenSpec(options=options, **chosen)
    units = units_of(files, spec.shard_size)
    if arguments.out_dir is not None:
        return _shards(arguments, spec, units, reader)
    for name in ("shard", "overwrite"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} is of a job that writes shards, so it needs --out-dir")
    if arguments.engine != "local":
        raise ValueError(f"--engine {arguments.engine} is of a job that writes shards, so it needs --out-dir")
    worker = Worker(spec)
    rows = (row for unit in units for row in worker.rows(unit))
    with ExitStack() as stack:
        out = stack.enter_context(arguments.out.open("w", encoding="utf-8")) if arguments.out else sys.stdout
        return _write(out, rows, reader.noun)


def _shards(arguments: argparse.Namespace, spec: TokenSpec, units: list[Unit], reader: type[FileTokenizer]) -> int:
    """The job over a collection; the exit code."""
    from tokenthrift.jobs.journal import locked
    from tokenthrift.jobs.keys import model_identity
    from tokenthrift.jobs.stopping import Stop
    from tokenthrift.shards.job import ShardJob

    root: Path = arguments.out_dir
    real = root.resolve()
    inside = any(path.resolve().is_relative_to(real) for unit in units for path, _ in unit.files)
    folders = [name for name in arguments.input if Path(name).is_dir()]
    if inside or any(real.is_relative_to(Path(name).resolve()) for name in folders):
        raise ValueError(f"--out-dir {root} and an input lie in each other: its shards would be inputs of the next run")
    if "codes" in spec.options:
        spec = replace(spec, options={**spec.options, "codes": True})
    name = "journal"
    if arguments.shard:
        number, of = arguments.shard
        units, name = units[number - 1 :: of], f"journal-{number}-of-{of}"
    root.mkdir(parents=True, exist_ok=True)
    with locked(root, arguments.shard):
        job = ShardJob(
            root,
            units,
            spec,
            model_identity(spec.model, spec.revision),
            arguments.format,
            reader.columns,
            journal=name,
            overwrite=arguments.overwrite,
        )
        todo, stop, interrupted = job.todo(), Stop(), False
        print(f"{len(todo)} of {len(units)} parts of the collection to do", file=sys.stderr)
        try:
            with stop.on_signals():
                pieces = job.run(todo, stop, arguments.engine, workers=arguments.workers, address=arguments.ray_address)
                for shard, piece in pieces if todo else ():
                    for row in piece.rows:
                        if "failed" in row:
                            print(f"failed: {row['file']}: {row['failed']}", file=sys.stderr)
                    print(f"{shard}: {len(piece.rows)} {reader.noun}s", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            interrupted = True
        interrupted = interrupted or stop.signaled
        sums = job.close(complete=not interrupted)
    share = f", {sums['tokens'] / sums['completed']:.1f} each" if sums["completed"] else ""
    print(
        f"{sums['completed']} {reader.noun}s: {sums['tokens']:,} tokens{share}, in {sums['shards']} shards",
        file=sys.stderr,
    )
    if sums["failed"]:
        print(f"{sums['failed']} failed", file=sys.stderr)
    if interrupted:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return FAILED if sums["failed"] else DONE


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


def _write(out: TextIO, rows: Iterator[Mapping[str, Any]], noun: str) -> int:
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
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="a file, a WebDataset tar, a Parquet table, a folder, or a pattern",
    )
    add_any_suffix(parser)
    add_model_option(parser)
    parser.add_argument("--budget", metavar="B", help="ceilings for each file (default: none)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FILE", help="where the JSON lines go (default: stdout)")
    where.add_argument("--out-dir", type=Path, metavar="DIR", help="where shards go; made if it does not exist")
    parser.add_argument("--column", metavar="NAME", help="of tables, the one with bytes (default: the only one)")
    shards = parser.add_argument_group("shards, with --out-dir; codes are always in them")
    shards.add_argument(
        "--format",
        choices=["webdataset", "parquet", "jsonl"],
        default="webdataset",
        help="tars with a JSON file an item, tables, or JSON lines (default: %(default)s)",
    )
    shards.add_argument(
        "--shard-size", type=count, default=1000, metavar="N", help="most items of a shard (default: %(default)s)"
    )
    again = shards.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="skip what is done (the default)")
    again.add_argument("--overwrite", action="store_true", help="do all again, and replace files of others")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=count, default=8, metavar="N", help="items at once (default: 8)")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add_engine(machine)
    return parser
