"""`tokenthrift evaluate mtsk`: its options; `evaluate` does the work. Imports nothing heavy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenthrift.commands.arguments import add_model_option, make_parser
from tokenthrift.registry import resolve

__all__ = ["main"]

_RUN = "tokenthrift.mtsk.evaluation.evaluate:run"


def main(argv: Sequence[str]) -> int:
    """Runs the command; see `evaluate.run`.

    Args:
        argv: arguments after `evaluate mtsk`.
    """
    parser = make_parser("evaluate mtsk", "Errors against tokens.")
    add_model_option(
        parser, action="append", type=_named, metavar="[NAME=]MODEL", help="a folder or Hub id; may be repeated"
    )
    base = "independent model of the finest pair of rates, to be pooled without training"
    parser.add_argument("--pool", metavar="MODEL", help=base)
    sets_help = "folder of a manifest.jsonl; sets named synthetic... are also taken together"
    parser.add_argument("--data", action="append", required=True, type=_named, metavar="[NAME=]DIR", help=sets_help)
    parser.add_argument("--babble", metavar="FILE", help="noise for the levels of --snr")
    levels = [None, 10.0, 5.0, 0.0, -5.0]
    parser.add_argument("--snr", nargs="+", type=_level, default=levels, help="dB, or clean (clean 10 5 0 -5)")
    parser.add_argument("--limit", type=int, help="most items of a set")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.md, report.json and the plots")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    compared = "of texts before they are compared: lower case without punctuation, as in the paper, or Whisper's"
    parser.add_argument("--normalizer", choices=("published", "whisper"), default="published", help=compared)
    kept = "save the first model here, with what was measured as the table its budgets choose by; development data only"
    parser.add_argument("--table", type=Path, metavar="FOLDER", help=kept)
    arguments = parser.parse_args(argv)
    arguments.data = [(name or Path(path).name, path) for name, path in arguments.data]
    if len({name for name, _ in arguments.data}) < len(arguments.data):
        parser.error("--data: two sets have one name; tell them apart with NAME=DIR")
    run: Callable[..., int] = resolve(_RUN)
    return run(arguments, argv)


def _named(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    return (name, path) if equals else ("", given)


def _level(text: str) -> float | None:
    """A level in dB, or None for clean."""
    if text == "clean":
        return None
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not math.isfinite(level):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a level in dB nor clean")
    return level
