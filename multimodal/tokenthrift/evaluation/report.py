"""An evaluation as files: `report.md` for people, `report.json` for programs, one PNG a plot.

Every figure of a report is read together with what made it, so the settings (model, data, seed, command) stand first.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenthrift.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cell", "Table", "new_figure", "write_report"]

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under named columns, with a title and a remark below.

    A None stands for "not measured".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells for {len(self.columns)} columns: {row}")

    def to_markdown(self) -> str:
        """The table as GitHub-flavoured Markdown; floats with four significant digits."""
        lines = [_line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line([_text(cell) for cell in row]) for row in self.rows]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])

    def to_plain(self) -> dict[str, Any]:
        """Title, remark, and one mapping a row."""
        rows = [{name: _plain(cell) for name, cell in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


def new_figure(width: float = 7.0, height: float = 4.5, **options: Any) -> tuple["Figure", Any]:
    """A matplotlib figure and its axes, outside pyplot's global state.

    Args:
        width: in inches.
        height: in inches.
        options: for `Figure.subplots`, such as rows and columns.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def write_report(
    folder: str | Path,
    *,
    title: str,
    settings: Mapping[str, Cell],
    tables: Sequence[Table],
    figures: Mapping[str, "Figure"] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Writes `report.md`, `report.json` and `NAME.png` for each figure; each file appears whole or not at all.

    Args:
        folder: made if needed; files of these names are replaced.
        title: first line.
        settings: what a reader needs to run it again: model, data, seed, command.
        tables: in the order of the report.
        figures: name without suffix to matplotlib figure.
        notes: sentences that hold for the whole report.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures or {}
    for name, figure in figures.items():
        whole = folder / f".{name}.png.part"
        figure.savefig(whole, dpi=150, format="png")
        os.replace(whole, folder / f"{name}.png")
    plain = {
        "title": title,
        "settings": {name: _plain(value) for name, value in settings.items()},
        "notes": list(notes),
        "tables": [table.to_plain() for table in tables],
        "figures": [f"{name}.png" for name in figures],
    }
    _write(folder / "report.json", json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    parts = [
        f"# {title}",
        "\n".join(
            [_line(["setting", "value"]), _line(["---", "---"])]
            + [_line([name, _text(value)]) for name, value in settings.items()]
        ),
    ]
    parts += [*notes, *(table.to_markdown() for table in tables)]
    parts += [f"![{name.replace('_', ' ')}]({name}.png)" for name in figures]
    _write(folder / "report.md", "\n\n".join(parts) + "\n")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}" if abs(cell) < 1e4 else f"{cell:,.0f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _plain(cell: Cell) -> Cell:
    # JSON has no NaN; what could not be measured is null there.
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _write(path: Path, text: str) -> None:
    whole = path.with_name(f".{path.name}.part")
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, path)
