"""`tokenthrift plan PROMPT.yaml`: what every part of a prompt gets in one context window, before anything runs.

The prompt is described in `tokenthrift.prompt_file`. Models are built without memory, and of media only the headers are
read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenthrift.commands.arguments import DONE, WRONG_USAGE, count, fail, make_parser

if TYPE_CHECKING:
    from tokenthrift.window import WindowPlan

__all__ = ["is_prompt", "main"]

_EPILOG = """\
example of a prompt:
  context: 2048
  answer: 64                    # kept free for the answer
  split: demand                 # by native tokens; or value (measured quality), equal
  tokenizer: owner/llm          # counts the text
  models: {image: owner/karl, video: merging, audio: owner/speech}
  prompt:
    - text: What do picture and recording have in common?
    - image: photo.jpg
    - video: {native: 6272}     # no file yet
      weight: 2
    - audio: recording.wav
      budget: 25%

exit status: 0 done, 2 wrong usage, or a window that is too small"""


def is_prompt(argv: Sequence[str]) -> bool:
    """Whether the arguments of `plan` name a prompt and not media."""
    return any(not word.startswith("-") and Path(word).suffix.lower() in (".yaml", ".yml") for word in argv)


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        from tokenthrift.prompt_file import read_prompt

        plan = read_prompt(arguments.prompt, context=arguments.context, split=arguments.split).plan()
    except (OSError, ValueError, ImportError) as error:
        return fail("plan", error, WRONG_USAGE)
    if arguments.json:
        print(json.dumps(plan.to_plain(), ensure_ascii=False))
    else:
        _print_table(plan)
    return DONE


def _print_table(plan: WindowPlan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("item", overflow="fold")
    table.add_column("kind")
    for name in ("native", "at most", "kept"):
        table.add_column(name, justify="right")
    valued = any(planned.expected is not None for planned in plan.items)
    if valued:
        table.add_column("expected quality", justify="right")
    for planned in plan.items:
        usage, expected = planned.usage, planned.expected
        row = [f"{usage.native:,}", f"{usage.used:,}", f"{usage.retention:.0%}"]
        if valued:
            row.append("" if expected is None else f"{expected:.3f}")
        table.add_row(Text(planned.item.name), planned.item.kind, *row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    reserved = f", {plan.reserved:,} kept free for the answer" if plan.reserved else ""
    left = plan.total - plan.reserved - plan.used
    print(
        f"{plan.used:,} of {plan.total:,} tokens (native {plan.native:,}), by {plan.split}{reserved}, {left:,} left",
        file=sys.stderr,
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "plan",
        "Say what every part of a prompt gets in one context window, before anything is computed.",
        usage="%(prog)s PROMPT.yaml [--context N] [--split demand|value|equal] [--json]",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "prompt", type=Path, metavar="PROMPT.yaml", help="text, pictures, clips, recordings, talking videos"
    )
    parser.add_argument("--context", type=count, metavar="N", help="tokens of the window (default: the prompt's own)")
    parser.add_argument(
        "--split",
        choices=("demand", "value", "equal"),
        help="how tokens are shared (default: the prompt's own, or demand)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser
