"""Parquet tables with a column of bytes, as Hugging Face's data sets have them: a row is an item.

A table of a few kilobytes can claim gigabytes: a page states the size that it unpacks to, and a dictionary may hold one
long value that every row names. So the pages of the column are walked first, by their headers alone, and one that
claims too much fails the table; rows are read a few at once, the fewer the larger the dictionary is, and never a whole
row group. A path in a table is not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from tokenthrift import extras
from tokenthrift.shards.items import Item, ItemError

__all__ = ["TableError", "table_items"]

MAX_PAGE_BYTES: Final = 1 << 28
_ROWS: Final = 16
_BUFFER: Final = 1 << 20
_SHARED: Final = 1 << 26
_HEADER: Final = 1 << 16
_NESTED: Final = 16
_DICTIONARY_PAGE: Final = 2


class TableError(ItemError):
    """A table that cannot be read, or has no such column."""


def table_items(path: Path, suffix: str, column: str | None = None) -> Iterator[Item]:
    """The values of a column, in their order.

    Args:
        path: the table.
        suffix: that the items get, with its dot.
        column: its name; the only one of bytes if None.

    Yields:
        An item for each row, named by its number, and a failed one for what could not be read.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    parquet, arrow = extras.require("pyarrow.parquet"), extras.require("pyarrow")
    row = 0
    try:
        with path.open("rb") as file:
            try:
                table = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
                leaf = _leaf(table.schema_arrow, column, arrow)
                columns = [i for i in range(len(table.schema)) if table.schema.column(i).path == leaf]
                if len(columns) != 1:
                    raise TableError(f"no single column {leaf}")
                groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
                shared = max((_check_pages(file, group.column(columns[0])) for group in groups), default=0)
                # Every row may be a value as long as the whole dictionary.
                rows = max(1, min(_ROWS, _SHARED // max(1, shared)))
                for batch in table.iter_batches(rows, columns=[leaf], use_threads=False):
                    values = batch.column(0)
                    if "." in leaf and arrow.types.is_struct(values.type):
                        values = values.field(0)
                    for value in _buffers(values, arrow):
                        yield _item(path, row, suffix, value)
                        row += 1
            except (arrow.ArrowException, ValueError, OSError, EOFError, MemoryError) as error:
                reason = getattr(error, "reason", None) or f"no table of Parquet, or damaged: {error}"
                before = f" behind row {row - 1}; the rest is lost" if row else ""
                yield Item(None, str(path), error=TableError(f"{reason}{before}"))
    except OSError as error:
        yield Item(None, str(path), error=TableError(f"cannot be read: {error.strerror}"))


def _item(path: Path, row: int, suffix: str, value: Any) -> Item:
    name, source = f"{row:09}{suffix}", f"{path}#{row}"
    if value is None:
        return Item(name, source, error=ItemError("no bytes"))
    return Item(name, source, copy=lambda: iter((memoryview(value),)))


def _leaf(schema: Any, column: str | None, arrow: Any) -> str:
    """The path of the column of bytes in the file's schema."""

    def leaf_of(field: Any) -> str | None:
        kinds = arrow.types
        kind = field.type.value_type if kinds.is_dictionary(field.type) else field.type
        if kinds.is_binary(kind) or kinds.is_large_binary(kind):
            return str(field.name)
        if kinds.is_struct(kind):
            inner = [kind.field(i) for i in range(kind.num_fields)]
            if any(f.name == "bytes" and leaf_of(f) for f in inner):
                return f"{field.name}.bytes"
        return None

    found = {field.name: leaf for field in schema if (leaf := leaf_of(field))}
    if column is not None:
        if column not in found:
            raise TableError(f"no column {column!r} of bytes; there is {', '.join(found) or 'none'}")
        return found[column]
    if len(found) != 1:
        raise TableError(f"{len(found)} columns of bytes ({', '.join(found) or 'none'}); --column chooses")
    return next(iter(found.values()))


def _buffers(values: Any, arrow: Any) -> Iterator[Any]:
    """A buffer for each value, or None, without a copy."""
    if not arrow.types.is_dictionary(values.type):
        for value in values:
            yield value.as_buffer()
        return
    for index in values.indices:
        position = index.as_py()
        value = None if position is None else values.dictionary[position]
        yield None if value is None or not value.is_valid else value.as_buffer()


def _check_pages(file: IO[bytes], column: Any) -> int:
    """Refuses pages that claim more than they may; the bytes of the dictionary, 0 if there is none.

    Raises:
        TableError: one does, or the pages are not where the footer says.
    """
    offset = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        offset = min(offset, column.dictionary_page_offset)
    end = offset + column.total_compressed_size
    size = os.fstat(file.fileno()).st_size
    if not 0 <= offset <= end <= size:
        raise TableError(f"damaged: pages from byte {offset} to {end} of {size}")
    shared = 0
    while offset < end:
        file.seek(offset)
        header = _Thrift(file.read(_HEADER))
        fields = header.struct()
        unpacked, packed = fields.get(2), fields.get(3)
        if not isinstance(unpacked, int) or not isinstance(packed, int) or packed < 0 or unpacked < 0:
            raise TableError(f"damaged: no page at byte {offset}")
        if unpacked > MAX_PAGE_BYTES:
            raise TableError(f"a page that claims {unpacked} bytes, more than {MAX_PAGE_BYTES}")
        if fields.get(1) == _DICTIONARY_PAGE:
            shared = max(shared, unpacked)
        offset += header.at + packed
    return shared


class _Thrift:
    """What is needed of Thrift's compact protocol: the whole numbers of a struct, and where it ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Fields that are whole numbers, by their number; all others are passed over."""
        fields: dict[int, int] = {}
        number = 0
        while kind := self._byte():
            step, kind = kind >> 4, kind & 15
            number = number + step if step else self._signed()
            value = self._value(kind, depth)
            if value is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | None:
        if depth > _NESTED:
            raise TableError("damaged: a page header without end")
        if kind in (1, 2):  # true, false
            return None
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (3, 7):  # a byte, a double
            self._skip(1 if kind == 3 else 8)
        elif kind == 8:
            self._skip(self._varint())
        elif kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(min(count, len(self.data))):
                self._value(head & 15 if head & 15 > 2 else 3, depth + 1)
        elif kind == 12:
            self.struct(depth + 1)
        else:
            raise TableError("damaged: no page header")
        return None

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise TableError("damaged: a page header without end")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise TableError("damaged: no page header")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise TableError("damaged: a page header without end")
