"""`tokenthrift demo`: a page on this machine where a file, a model and a budget give token counts and a result.

It listens on 127.0.0.1 only and sends nothing anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenthrift.commands.arguments import DONE, fail, make_parser

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs the command until it is interrupted."""
    parser = make_parser("demo", "Open a page on this machine: drop a picture, a clip or a recording, move the budget.")
    parser.add_argument(
        "--model", action="append", metavar="M", help="a folder or owner/name (default: all that are found)"
    )
    parser.add_argument("--port", type=int, default=7860, help="of 127.0.0.1 (default: 7860)")
    arguments = parser.parse_args(argv)
    try:
        from tokenthrift.demo.page import build
        from tokenthrift.models import list_models

        models = arguments.model or list_models()
        if not models:
            raise ValueError("no models here; give --model, or start it in a folder that holds model_cards/")
        build(models).launch(server_name="127.0.0.1", server_port=arguments.port, share=False)
    except (ImportError, OSError, ValueError) as error:
        return fail("demo", error)
    return DONE
