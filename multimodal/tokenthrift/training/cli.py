"""`tokenthrift fit|validate|test|predict`: Lightning's command line over every model and every data set.

A recipe names a LightningModule and a LightningDataModule (`class_path`) and their arguments (`init_args`); flags on
the command line win over it. Classes of one's own are found in the current folder, as `mydata.MyData`. What differs
from a plain LightningCLI: only the parser of the command at hand is built, arguments saved in a checkpoint neither
override the recipe nor choose which class is built, runs are seeded, the random state is part of every checkpoint,
metrics go to a CSV file and to TensorBoard unless the recipe names its loggers, and a precision that the processor only
imitates is named.
"""

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Final

# Read when jsonargparse is imported: Lightning calls functions that jsonargparse will drop in its next major release.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from jsonargparse import set_parsing_settings
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from tokenthrift.commands.train import DESCRIPTIONS, HINTS, USAGE
from tokenthrift.training.precision import warn_of_slow_precision
from tokenthrift.training.random_state import RandomState

SEED: Final = 0


class TrainingCLI(LightningCLI):
    """One command of the Trainer.

    Args:
        command: fit, validate, test or predict.
        argv: its options.
    """

    def __init__(self, command: str, argv: Sequence[str]) -> None:
        self._command = command
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=SEED,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [RandomState()]},
            parser_kwargs={
                "prog": "tokenthrift",
                command: {
                    "usage": USAGE.format(command),
                    "description": f"{DESCRIPTIONS[command]} {HINTS}",
                },
            },
            args=[command, *argv],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command at hand; every further one would cost seconds of building a parser."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without Lightning's warning about arguments that do not come from `sys.argv`."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Where the recipe leaves the loggers open, metrics.csv is written, and TensorBoard's file beside it."""
        if config.get("logger") in (None, True):
            config = {**config, "logger": default_loggers(config.get("default_root_dir") or os.getcwd())}
        trainer = super()._instantiate_trainer(config, callbacks)
        warn_of_slow_precision(trainer.strategy.root_device.type, trainer.precision)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Leaves the checkpoint's saved arguments alone: a resumed run does what its recipe and flags say."""


def default_loggers(folder: str) -> list[Logger]:
    """CSV, and TensorBoard where it is installed, in one new folder `lightning_logs/version_N` below a folder."""
    csv = CSVLogger(folder)
    loggers: list[Logger] = [csv]
    if importlib.util.find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(folder, version=csv.version, default_hp_metric=False))
    return loggers


def run(command: str, argv: Sequence[str]) -> int:
    """Runs one command to its end.

    Returns:
        The exit code; wrong usage raises SystemExit(2) as argparse does.
    """
    _silence_known_noise()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a recipe's own classes lie; last, so that it hides no package
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # fields of configurations explain themselves
    TrainingCLI(command, argv)
    return 0


def _silence_known_noise() -> None:
    """Advertisements and warnings about code that is not ours, each by its own words; everything else is shown."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*`tensorboardX` has been removed as a dependency")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith("💡 Tip:")
    )
