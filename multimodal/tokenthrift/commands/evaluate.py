"""`tokenthrift evaluate SYSTEM`: hands over to the system's own evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenthrift.commands.arguments import fail, make_parser
from tokenthrift.registry import resolve, those_with

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs one system's evaluation."""
    evaluators = those_with("evaluator")
    parser = make_parser(
        "evaluate",
        "Measure a model against its baselines at equal tokens; writes report.md, report.json and plots.",
        epilog="The options depend on the system: tokenthrift evaluate SYSTEM --help",
    )
    parser.add_argument("system", metavar="SYSTEM", choices=sorted(evaluators), help=" or ".join(sorted(evaluators)))
    system = parser.parse_args(argv[:1]).system
    evaluate: Callable[[Sequence[str]], int] = resolve(evaluators[system])
    try:
        return evaluate(argv[1:])
    except (ImportError, OSError, ValueError) as error:
        return fail(f"evaluate {system}", error)
