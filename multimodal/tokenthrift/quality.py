"""Quality against tokens, measured: what a model's answers are worth at each count, and the file that says so.

`tokenthrift evaluate` writes `quality.json` beside a model: plain data, one curve for each kind of input, with the
metric, the data and the command it came from. `Window` and `allocate_by_value` read it to give each item of a prompt
the tokens that buy most.

A curve is read through its concave hull: measured points scatter, and where a point lies below the line between two
others, a mix of these two over many items does better than it. Beyond the best point more tokens buy nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tokenthrift.config import ConfigError, load_json

__all__ = ["QUALITY", "QualityCurve", "QualityError", "measured_curve", "read_quality", "save_curves", "write_quality"]

QUALITY: Final = "quality.json"
"""Name of the file in a model's folder."""
_FORMAT: Final = 1


class QualityError(ValueError):
    """A curve that is none, or a `quality.json` that does not hold curves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityCurve:
    """Quality of one kind of input at some counts of tokens.

    Quality is a share of what could be reached, from 0 to 1 (accuracy; 1 - error rate), so that curves of several kinds
    add up. No tokens are worth 0, unless a point at 0 tokens says what can be had without the item.
    """

    tokens: tuple[int, ...]
    """Counts, ascending."""
    quality: tuple[float, ...]
    """Measured at each count."""
    kind: str = ""
    """What the items are: image, video, audio, talking."""
    metric: str = ""
    """What quality means."""
    data: str = ""
    """What it was measured on, in words."""
    command: str = ""
    """What measured it."""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.quality) or not self.tokens:
            raise QualityError(
                f"{len(self.tokens)} counts and {len(self.quality)} qualities; a curve has as many, from 1"
            )
        whole = all(type(n) is int and n >= 0 for n in self.tokens)  # not a bool, which JSON may hold as well
        if not whole or list(self.tokens) != sorted(set(self.tokens)):
            raise QualityError(f"counts are whole numbers from 0, ascending and distinct, not {list(self.tokens)}")
        for value in self.quality:
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise QualityError(f"quality lies between 0 and 1, not {value!r}")

    def hull(self) -> list[tuple[int, float]]:
        """The corners of the concave hull, from 0 tokens to the fewest with the best quality; it never falls."""
        points = list(zip(self.tokens, self.quality, strict=True))
        if points[0][0] > 0:
            points.insert(0, (0, 0.0))
        best = max(value for _, value in points)
        corners: list[tuple[int, float]] = []
        for n, value in points:
            if corners and value <= corners[-1][1]:
                continue
            while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-2], (n, value)):
                corners.pop()
            corners.append((n, value))
            if value == best:
                break  # more tokens buy nothing
        return corners

    def at(self, tokens: int) -> float:
        """Expected quality at a count, on the hull."""
        corners = self.hull()
        for left, right in zip(corners, corners[1:], strict=False):
            if tokens < right[0]:
                return left[1] + (tokens - left[0]) * _slope(left, right)
        return corners[-1][1]


def read_quality(path: Path) -> dict[str, QualityCurve]:
    """The curves of a `quality.json`, or of the one in a model's folder, by kind.

    Raises:
        QualityError: It is not such a file; the message says where.
        OSError: It is not there.
    """
    file = path / QUALITY if path.is_dir() else path
    try:
        found = load_json(file)
    except ConfigError as error:
        raise QualityError(str(error)) from error
    rows = found.get("curves") if isinstance(found, dict) else None
    if not isinstance(rows, list) or found.get("format_version") != _FORMAT:
        raise QualityError(f'{file}: expected {{"format_version": {_FORMAT}, "curves": [...]}}')
    curves: dict[str, QualityCurve] = {}
    for i, row in enumerate(rows):
        where = f"{file}: curve {i}"
        curve = _curve(row, where)
        if curve.kind in curves:
            raise QualityError(f"{where}: a second curve of kind {curve.kind!r}")
        curves[curve.kind] = curve
    return curves


def write_quality(folder: Path, curves: Sequence[QualityCurve]) -> Path:
    """Writes `quality.json` into a folder; curves of other kinds that are there stay.

    Returns:
        The file.
    """
    file = folder / QUALITY
    kept = read_quality(file) if file.exists() else {}
    kept |= {curve.kind: curve for curve in curves}
    rows = [{name: value for name, value in asdict(curve).items() if value != ""} for curve in kept.values()]
    text = json.dumps({"format_version": _FORMAT, "curves": rows}, indent=2, ensure_ascii=False)
    draft = file.with_name(f".{file.name}.partial")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(file)
    return file


def save_curves(model: str | Path, out: Path, curves: Sequence[QualityCurve]) -> None:
    """Writes what an evaluation measured into its own folder, and beside the model where that is on this machine."""
    for folder in (out, Path(model)):
        if curves and folder.is_dir():
            write_quality(folder, curves)


def measured_curve(points: Mapping[int, float] | Sequence[tuple[int, float]], **texts: str) -> QualityCurve:
    """A curve of measured points in any order; of several at one count the best, and none outside of 0 to 1.

    Args:
        points: counts of tokens and quality.
        texts: kind, metric, data and command.
    """
    best: dict[int, float] = {}
    for n, value in points.items() if isinstance(points, Mapping) else points:
        best[n] = max(best.get(n, 0.0), min(max(value, 0.0), 1.0))
    counts = sorted(best)
    return QualityCurve(tokens=tuple(counts), quality=tuple(round(best[n], 6) for n in counts), **texts)


def _curve(row: Any, where: str) -> QualityCurve:
    names = QualityCurve.__dataclass_fields__
    if not isinstance(row, dict) or not {"tokens", "quality"} <= set(row) <= set(names):
        raise QualityError(f"{where}: expected tokens, quality and any of {', '.join(names)}")
    texts = {name: value for name, value in row.items() if name not in ("tokens", "quality")}
    if not all(isinstance(value, str) for value in texts.values()):
        raise QualityError(f"{where}: {', '.join(texts)} are texts")
    if not isinstance(row["tokens"], list) or not isinstance(row["quality"], list):
        raise QualityError(f"{where}: tokens and quality are lists")
    try:
        return QualityCurve(tokens=tuple(row["tokens"]), quality=tuple(row["quality"]), **texts)
    except QualityError as error:
        raise QualityError(f"{where}: {error}") from None


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
