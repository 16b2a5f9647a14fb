"""Rows to the bytes of a shard: a WebDataset tar with a JSON file a sample, a Parquet table, or JSON lines.

The same rows give the same bytes: members of tars have no time and no owner. A table has all columns that the system
can fill, whichever are in its rows, so that all shards of a job have one schema.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tokenthrift import extras

if TYPE_CHECKING:
    from tokenthrift.tokenize import Column

__all__ = ["FORMATS", "Columns", "Rows", "count_rows"]

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Columns: TypeAlias = "Mapping[str, Column]"

_ALWAYS: Final[Columns] = MappingProxyType(
    {"key": "text", "file": "text", "status": "text", "failed": "text", "type": "text"}
)


def to_webdataset(rows: Rows, columns: Columns) -> bytes:
    """A tar with `KEY.json` for each row."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for row in rows:
            text = _line(row).encode()
            member = tarfile.TarInfo(f"{row['key']}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return data.getvalue()


def to_parquet(rows: Rows, columns: Columns) -> bytes:
    """A table with a column for each figure.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = extras.require("pyarrow"), extras.require("pyarrow.parquet")
    numbers = ("share", "second", "row", "column")
    kinds = {
        "text": arrow.string(),
        "int": arrow.int64(),
        "float": arrow.float64(),
        "ints": arrow.list_(arrow.int32()),
        "regions": arrow.list_(arrow.struct([(name, arrow.float64()) for name in numbers])),
    }
    schema = arrow.schema([(name, kinds[kind]) for name, kind in {**_ALWAYS, **columns}.items()])
    out = arrow.BufferOutputStream()
    parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows], schema=schema), out)
    return bytes(out.getvalue())


def to_lines(rows: Rows, columns: Columns) -> bytes:
    """A JSON object a line."""
    return "".join(f"{_line(row)}\n" for row in rows).encode()


FORMATS: Final[Mapping[str, tuple[str, Callable[[Rows, Columns], bytes]]]] = MappingProxyType(
    {"webdataset": ("tar", to_webdataset), "parquet": ("parquet", to_parquet), "jsonl": ("jsonl", to_lines)}
)
"""Format to the suffix of its shards and the function that makes them."""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def count_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Items, completed and failed ones, native tokens and tokens of rows."""
    counts = dict.fromkeys(("items", "completed", "failed", "native", "tokens"), 0)
    for row in rows:
        counts["items"] += 1
        counts["failed" if "failed" in row else "completed"] += 1
        counts["native"] += row.get("native", 0)
        counts["tokens"] += row.get("tokens", 0)
    return counts
