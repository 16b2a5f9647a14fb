"""What a validation read, for people: `texts.md` beside `metrics.csv`, and the text panel of TensorBoard.

Not in Llama-MTSK (arXiv 2503.06362): word error rates do not say what kind of words are wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tokenthrift.mtsk.rates import Rates

__all__ = ["TEXTS", "log_texts"]

TEXTS: Final = "texts.md"


def log_texts(
    loggers: Sequence[object], step: int, texts: Mapping[Rates, Sequence[tuple[str, str]]], most: int = 8
) -> None:
    """Writes some of the texts of a validation where the loggers keep things.

    Args:
        loggers: of the Trainer; those that can hold no text are left alone.
        step: of training.
        texts: what was said and what was read, by pair of rates.
        most: items that are shown.
    """
    rows = ["| rates | said | read |", "| --- | --- | --- |"]
    rows += [f"| {rates} | {said} | {read} |" for rates, own in texts.items() for said, read in own[:most]]
    table = "\n".join(rows)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("val/texts", table, step)
        elif isinstance(logger, CSVLogger):
            folder = Path(logger.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / TEXTS).open("a", encoding="utf-8") as file:
                file.write(f"Step {step}\n\n{table}\n\n")
