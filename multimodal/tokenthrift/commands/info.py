"""`tokenthrift info`: what a model is, how large, what its input costs and which budgets it honors.

The model is built without memory, and of its weights only the header is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenthrift.commands.arguments import DONE, add_model, fail, make_parser

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = make_parser("info", "Show what a model is, how large, what its input costs and which budgets it honors.")
    add_model(parser)
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    arguments = parser.parse_args(argv)
    try:
        from tokenthrift.models import describe

        print(describe(arguments.model, arguments.revision, arguments.local_files_only))
    except (ImportError, OSError, ValueError) as error:
        return fail("info", error)
    return DONE
