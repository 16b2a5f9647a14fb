"""`tokenthrift fit`, `validate`, `test` and `predict`: their first page of help, and Lightning's command line.

Lightning takes seconds to import, and its own help lists hundreds of options; the first page says what to do first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from tokenthrift.commands.arguments import DONE
from tokenthrift.registry import resolve

__all__ = ["DESCRIPTIONS", "HINTS", "USAGE", "fit", "predict", "run", "test", "validate"]

USAGE: Final = "tokenthrift {} --config RECIPE.yaml [--NAME VALUE ...]"
DESCRIPTIONS: Final = {
    "fit": "Train a model. An interrupted run goes on with the same recipe and --ckpt_path FOLDER/last.ckpt.",
    "validate": "Measure a model on the validation data.",
    "test": "Measure a model on the test data.",
    "predict": "Run a model over the prediction data.",
}
HINTS: Final = (
    "Every value of the recipe can be given as a flag (--trainer.max_epochs 3), and the flag wins. "
    "--print_config shows the whole recipe that would run; --model.help CLASS and --data.help CLASS list what a class "
    "takes."
)
_PAGE: Final = """\
usage: {usage}

{description}

options:
  --config FILE          a recipe: model, data and trainer; of several, the last wins
  --ckpt_path FILE       the checkpoint to start from
  --print_config         show the whole recipe that would run, and end
  --seed_everything N    of all random numbers
  --trainer.NAME VALUE   max_epochs, max_steps, devices, accelerator, precision, ...
  --model.NAME VALUE     --model.help CLASS lists them, for example of tokenthrift.karl.KarlStage1Module
  --data.NAME VALUE      --data.help CLASS lists them, for example of tokenthrift.karl.KarlDataModule

Every value of the recipe can be given as a flag, and the flag wins. All options with their types and defaults:
  tokenthrift {command} --config RECIPE.yaml --help"""


def run(command: str, argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        command: fit, validate, test or predict.
        argv: its options.

    Returns:
        The exit code; wrong usage raises SystemExit(2) as argparse does.

    Raises:
        MissingExtraError: the extra `train` is not installed.
    """
    if list(argv) in (["-h"], ["--help"]):
        print(_PAGE.format(usage=USAGE.format(command), description=DESCRIPTIONS[command], command=command))
        return DONE
    train: Callable[..., int] = resolve("tokenthrift.training.cli:run")
    return train(command, argv)


fit = partial(run, "fit")
validate = partial(run, "validate")
test = partial(run, "test")
predict = partial(run, "predict")
