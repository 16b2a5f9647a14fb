"""`tokenthrift`: one command over everything, from one table.

A command is a function that takes its arguments and returns an exit code (0 done, 1 something failed, 2 wrong usage or
a path that leads nowhere). It is imported when it is called, so `tokenthrift --help` needs neither torch nor a second.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

from tokenthrift.extras import MissingExtraError
from tokenthrift.registry import resolve
from tokenthrift.version import __version__

# Heading, then command: (function, one line of help).
COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Train (a recipe says what: --config recipes/SYSTEM/NAME.yaml)": {
        "fit": ("tokenthrift.commands.train:fit", "train a model"),
        "validate": ("tokenthrift.commands.train:validate", "measure a model on its validation data"),
        "test": ("tokenthrift.commands.train:test", "measure a model on its test data"),
        "predict": ("tokenthrift.commands.train:predict", "run a model over its prediction data"),
    },
    "Use": {
        "transcribe": ("tokenthrift.transcription.cli:main", "write transcripts of recordings"),
        "tokenize": ("tokenthrift.commands.tokenize:main", "turn pictures or clips into tokens under a budget"),
        "plan": ("tokenthrift.commands.plan:main", "say what files will cost at most, before anything runs"),
    },
    "Look": {
        "demo": ("tokenthrift.commands.demo:main", "a page on this machine: a file, a budget, tokens and the result"),
    },
    "Evaluate (a report with tables and plots)": {
        "evaluate": ("tokenthrift.commands.evaluate:main", "measure a model against its baselines at equal tokens"),
    },
    "Models (a folder, or owner/name on the Hugging Face Hub)": {
        "info": ("tokenthrift.commands.info:main", "show what a model is and which budgets it honors"),
        "push": ("tokenthrift.commands.push:main", "upload a model's folder to the Hub"),
        "convert": ("tokenthrift.commands.convert:main", "make a model's folder of checkpoints"),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; those of the process if not given.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(_help(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"tokenthrift {__version__}")
        return 0
    targets = {command: target for group in COMMANDS.values() for command, (target, _) in group.items()}
    if name not in targets:
        close = difflib.get_close_matches(name, targets, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see `tokenthrift --help`"
        print(
            f"tokenthrift: unknown {'option' if name.startswith('-') else 'command'} {name!r}; {hint}", file=sys.stderr
        )
        return 2
    try:
        command: Callable[[Sequence[str]], int] = resolve(targets[name])
        code = command(rest)
        sys.stdout.flush()
        return code
    except MissingExtraError as error:
        print(f"tokenthrift {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough; Python's own flush at the end would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _help() -> str:
    lines = [
        "usage: tokenthrift COMMAND [OPTIONS]",
        "",
        "Token budgets for multimodal language models: know what an input costs before it runs, and keep to it.",
    ]
    for heading, group in COMMANDS.items():
        lines += ["", f"{heading}:", *(f"  {name:<12}{text}" for name, (_, text) in group.items())]
    lines += ["", "Options:", "  -h, --help  show this help, or that of a command: tokenthrift COMMAND --help"]
    return "\n".join([*lines, "  --version   show the version"])


if __name__ == "__main__":
    sys.exit(main())
