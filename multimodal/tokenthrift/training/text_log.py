"""Sample texts of a validation, in every logger that a run has.

Loggers that know text get it (TensorBoard); beside any other, such as the CSV logger, the lines are written into a file
of its folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["log_texts"]


def log_texts(loggers: Iterable[Any], name: str, lines: Sequence[str], step: int) -> None:
    """Logs lines of text with each logger of a run.

    Args:
        loggers: Lightning's.
        name: of the text, such as `val/answers`.
        lines: of one line each.
        step: optimizer steps so far.
    """
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_text"):
            experiment.add_text(name, "\n".join(f"    {line}" for line in lines), step)  # Markdown of fixed width
        elif logger.log_dir is not None:
            path = Path(logger.log_dir) / "texts" / f"{name.replace('/', '-')}-{step:06d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
