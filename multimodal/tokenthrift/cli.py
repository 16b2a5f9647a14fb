"""`tokenthrift`: one command over everything, from one table.

A command is a function that takes its arguments and returns an exit code (0 done, 1 something failed, 2 wrong usage).
It is imported when it is called, so `tokenthrift --help` needs neither torch nor a second.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

# Heading, then command: (function, one line of help).
COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Train (a recipe says what: --config recipes/SYSTEM/NAME.yaml)": {
        "fit": ("tokenthrift.training.cli:fit", "train a model"),
        "validate": ("tokenthrift.training.cli:validate", "measure a model on its validation data"),
        "test": ("tokenthrift.training.cli:test", "measure a model on its test data"),
        "predict": ("tokenthrift.training.cli:predict", "run a model over its prediction data"),
    },
    "Use": {
        "transcribe": ("tokenthrift.transcription.cli:main", "write transcripts of recordings"),
        "tokenize": ("tokenthrift.tokenize:tokenize", "turn pictures or clips into tokens under a budget"),
        "plan": ("tokenthrift.tokenize:plan", "say what they will cost at most, before anything runs"),
    },
    "Judge (a report with tables and plots)": {
        "evaluate": ("tokenthrift.evaluation.cli:main", "measure a model against its rivals at equal tokens"),
    },
    "Models (a folder, or owner/name on the Hugging Face Hub)": {
        "info": ("tokenthrift.models:info", "show what a model is and which budgets it honours"),
        "push": ("tokenthrift.models:push", "upload a model's folder to the Hub"),
        "convert": ("tokenthrift.models:convert", "make a model's folder of checkpoints"),
    },
}
# The word in a model's config.json, and its class.
SYSTEMS: Final = {
    "dllm_asr": "tokenthrift.dllm_asr:DllmAsr",
    "dllm_asr_autoregressive": "tokenthrift.dllm_asr.autoregressive:AutoregressiveDecoder",
    "mtsk": "tokenthrift.mtsk:LlamaMtsk",
    "karl": "tokenthrift.karl:Karl",
    "vqtoken": "tokenthrift.vqtoken:VQToken",
    "vqtoken_answerer": "tokenthrift.vqtoken:VideoAnswerer",
}
# What `tokenthrift convert` reads, and the function that makes a model of checkpoint files.
CONVERTERS: Final = {
    "dllm_asr": "tokenthrift.dllm_asr.convert:dllm_asr",
    "dllm_asr_autoregressive": "tokenthrift.dllm_asr.convert:autoregressive",
    "avhubert": "tokenthrift.mtsk.convert:avhubert",
    "mtsk": "tokenthrift.mtsk.convert:mtsk",
    "karl": "tokenthrift.karl.convert:karl",
    "vqtoken": "tokenthrift.vqtoken.convert:vqtoken",
}

# What `tokenthrift tokenize` and `plan` do with files, by the system of the model: see tokenthrift.tokenize.
FILE_TOKENIZERS: Final[dict[str, str]] = {
    "karl": "tokenthrift.karl.files:ImageFiles",
    "vqtoken": "tokenthrift.vqtoken.files:VideoFiles",
    "vqtoken_answerer": "tokenthrift.vqtoken.files:VideoFiles",
}
# What `tokenthrift evaluate SYSTEM` runs: a function of the other arguments that returns an exit code.
EVALUATORS: Final[dict[str, str]] = {
    "karl": "tokenthrift.karl.evaluation.evaluate:main",
    "mtsk": "tokenthrift.mtsk.evaluation.evaluate:main",
    "vqtoken": "tokenthrift.vqtoken.evaluation.evaluate:main",
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
        print(f"tokenthrift {version('tokenthrift')}")
        return 0
    targets = {command: target for group in COMMANDS.values() for command, (target, _) in group.items()}
    if name not in targets:
        close = difflib.get_close_matches(name, targets, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see `tokenthrift --help`"
        print(
            f"tokenthrift: unknown {'option' if name.startswith('-') else 'command'} {name!r}; {hint}", file=sys.stderr
        )
        return 2
    command: Callable[[Sequence[str]], int] = load(targets[name])
    try:
        return command(rest)
    except KeyboardInterrupt:
        return 130


def load(target: str) -> Any:
    """Imports what `module:name` stands for."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


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
