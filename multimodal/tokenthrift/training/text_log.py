"""Sample texts of a validation, in every logger that a run has.

Loggers that know text get it (TensorBoard); beside any other, such as the CSV logger, the lines are written into a file
of its folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

__all__ = ["log_texts"]


def log_texts(module: LightningModule, name: str, lines: Sequence[str]) -> None:
    """Logs lines of text with each logger of a run, once: in its first process, and not before the first step.

    Args:
        module: that is trained or validated; one without a trainer has no loggers.
        name: of the text, such as `val/answers`.
        lines: of one line each.
    """
    if module._trainer is None or not module.trainer.is_global_zero or module.trainer.sanity_checking:
        return
    step = module.global_step
    for logger in module.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):
            experiment.add_text(name, "\n".join(f"    {line}" for line in lines), step)  # Markdown of fixed width
        elif (folder := getattr(logger, "log_dir", None)) is not None:
            path = Path(folder) / "texts" / f"{name.replace('/', '-')}-{step:06d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
