"""What the commands share: options, numbers, devices and exit codes. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

__all__ = [
    "BUDGETS",
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "WRONG_USAGE",
    "add_any_suffix",
    "add_engine",
    "add_model",
    "add_model_option",
    "add_revision",
    "count",
    "fail",
    "make_parser",
    "number",
]

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130

BUDGETS: Final = """\
budgets: 64 (tokens), 25% (of the native ones), 12.5/s, e0.05 (target error), or
  several joined by commas: 64,e0.05"""


def make_parser(command: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser whose texts keep their lines."""
    return argparse.ArgumentParser(
        prog=f"tokenthrift {command}",
        description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
        allow_abbrev=False,
        **options,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, as the first argument, and `--revision`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, or owner/name on the Hugging Face Hub")
    add_revision(parser)


def add_model_option(parser: argparse.ArgumentParser, **options: Any) -> None:
    """`--model` and `--revision`."""
    usual = {"metavar": "MODEL", "help": "a model folder, or owner/name on the Hugging Face Hub"}
    parser.add_argument("--model", required=True, **{**usual, **options})
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """`--revision` of a model on the Hub."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")


def add_any_suffix(parser: argparse.ArgumentParser) -> None:
    """`--any-suffix`, of commands that look into folders."""
    parser.add_argument(
        "--any-suffix", action="store_true", help="in folders, also take files by their content, whatever their suffix"
    )


def add_engine(group: Any) -> None:
    """`--shard`, `--engine`, `--ray-address`, `--workers` and `--threads`, of jobs that outgrow one machine."""
    group.add_argument(
        "--shard", type=_shard, metavar="I/N", help="do the I-th of N parts, for schedulers that start N processes"
    )
    group.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="where it runs (default: %(default)s)"
    )
    group.add_argument("--ray-address", metavar="ADDRESS", help="of a Ray cluster (default: start one here)")
    group.add_argument("--workers", type=count, default=2, metavar="N", help="models on Ray (default: %(default)s)")
    group.add_argument("--threads", type=count, metavar="N", help="processor threads (default: PyTorch's choice)")


def _shard(text: str) -> tuple[int, int]:
    number_, slash, of = text.partition("/")
    if slash and number_.isdecimal() and of.isdecimal() and 1 <= int(number_) <= int(of):
        return int(number_), int(of)
    raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def number(above: float, at_most: float = math.inf, *, or_equal: bool = False) -> Callable[[str], float]:
    """A reader of numbers in a range, with its lower end or without."""
    limits = f"{'from' if or_equal else 'above'} {above:g}"
    limits += f" and at most {at_most:g}" if math.isfinite(at_most) else ""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (above < value or or_equal and value == above) and value <= at_most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def fail(command: str, error: Exception, code: int | None = None) -> int:
    """Says what went wrong, in one line on stderr.

    Args:
        command: its name.
        error: what it raised.
        code: the exit code; if not given, 2 for a path, a model or an extra that is not there, and 1 for all else.

    Returns:
        The exit code.

    Raises:
        BrokenPipeError: that was the error: whoever read the output stopped; `cli.main` ends quietly.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    print(f"tokenthrift {command}: {error}", file=sys.stderr)
    if code is not None:
        return code
    # A missing name is wrong usage; so are tokenthrift's own errors about one, which are kinds of OSError.
    from tokenthrift.extras import MissingExtraError
    from tokenthrift.media.files import InputError
    from tokenthrift.sources import SourceError

    absent = (FileNotFoundError, NotADirectoryError, IsADirectoryError, SourceError, InputError, MissingExtraError)
    return WRONG_USAGE if isinstance(error, absent) else FAILED
