"""`tokenthrift evaluate karl`: its options; `evaluate` does the work. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenthrift.commands.arguments import add_model_option, make_parser
from tokenthrift.registry import resolve

__all__ = ["main"]

_RUN = "tokenthrift.karl.evaluation.evaluate:run"


def main(argv: Sequence[str]) -> int:
    """Runs the command; see `evaluate.run`.

    Args:
        argv: arguments after `evaluate karl`.
    """
    parser = make_parser(
        "evaluate karl",
        "Evaluate a KARL model on images; writes report.md, report.json and plots. A SOURCE is a folder of\n"
        "images, a .npy array, a .npz of JPEG files, or a .jsonl manifest; give several sets as NAME=SOURCE.",
    )
    add_model_option(parser)
    parser.add_argument("--data", required=True, nargs="+", metavar="SOURCE", help="test images")
    parser.add_argument(
        "--dev",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="other images, to calibrate on (default: the model's own calibration, if it has one)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--error", type=float, default=0.05, help="target error (default: %(default)s, the paper's)")
    parser.add_argument("--alpha", type=float, default=0.1, help="share that may miss (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="most images of each set (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of which images are taken (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default: cpu)")
    arguments = parser.parse_args(argv)
    run: Callable[..., int] = resolve(_RUN)
    return run(arguments, argv)
