"""`tokenthrift evaluate vqtoken`: its options; `evaluate` does the work. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenthrift.commands.arguments import add_model_option, make_parser
from tokenthrift.registry import resolve

__all__ = ["main"]

_RUN = "tokenthrift.vqtoken.evaluation.evaluate:run"


def main(argv: Sequence[str]) -> int:
    """Runs the command; see `evaluate.run`.

    Args:
        argv: arguments after `evaluate vqtoken`.
    """
    parser = make_parser("evaluate vqtoken", "Accuracy against tokens on synthetic video questions.")
    add_model_option(parser, help="folder of a VideoAnswerer, or owner/name on the Hub")
    parser.add_argument(
        "--data", required=True, type=Path, help="backgrounds, as recipes/vqtoken/backgrounds.py writes"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for report.md, report.json and the plot")
    parser.add_argument("--part", choices=("dev", "test"), default="test", help="of the question set (%(default)s)")
    parser.add_argument("--count", type=int, default=400, help="clips of a seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="sets of clips (%(default)s)")
    parser.add_argument("--tokens", type=_count, nargs="+", help="budgets (8 16 32 64)")
    parser.add_argument("--fixed", type=_count, nargs="*", help="more of VQToken alone (4 5 6 12)")
    errors = "of adaptive VQToken, 0 to 1 (0.5 0.4 0.3 0.2 0.1)"
    parser.add_argument("--errors", type=_share, nargs="*", help=errors)
    parser.add_argument("--clips", type=Path, help="folder of real clips to measure reconstruction on")
    arguments = parser.parse_args(argv)
    run: Callable[..., int] = resolve(_RUN)
    return run(arguments, argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens from 1")
    return int(text)


def _share(text: str) -> float:
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of the variance from 0 to 1")
