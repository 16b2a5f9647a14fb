"""`tokenthrift evaluate SYSTEM`: hands over to the system's own evaluation."""

import argparse
import sys
from collections.abc import Callable, Sequence

from tokenthrift.cli import EVALUATORS, load
from tokenthrift.extras import MissingExtraError


def main(argv: Sequence[str]) -> int:
    """Runs one system's evaluation.

    Args:
        argv: the system, then its own arguments.

    Returns:
        The exit code: 1 if the evaluation could not run, with the reason on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="tokenthrift evaluate",
        description="Measure a model against its rivals at equal tokens; writes report.md, report.json and plots.",
        epilog="The options depend on the system: tokenthrift evaluate SYSTEM --help",
    )
    parser.add_argument("system", metavar="SYSTEM", choices=sorted(EVALUATORS), help=" or ".join(sorted(EVALUATORS)))
    system = parser.parse_args(argv[:1]).system
    evaluate: Callable[[Sequence[str]], int] = load(EVALUATORS[system])
    try:
        return evaluate(argv[1:])
    except (MissingExtraError, OSError, ValueError) as error:
        print(f"tokenthrift evaluate {system}: {error}", file=sys.stderr)
        return 1
