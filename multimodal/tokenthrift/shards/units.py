"""What is worked on at once: a shard of the input, or so many loose files.

The order of the inputs and the size of an output shard decide which item lands in which shard, and nothing else does:
the same collection gives the same shards, whatever the machine, the number of workers and the moment of a crash.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenthrift.jobs.keys import file_identity
from tokenthrift.media.files import FoundFile
from tokenthrift.shards.items import Item
from tokenthrift.shards.table import table_items
from tokenthrift.shards.tar import tar_items

__all__ = ["SHARD_SUFFIXES", "Unit", "is_shard", "units_of"]

SHARD_SUFFIXES: Final = frozenset((".tar", ".parquet"))
_TARS: Final = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LOOSE: Final = "files"


@dataclass(frozen=True, slots=True)
class Unit:
    """Part of a collection, as plain data.

    Attributes:
        output: name of its output shards below the output folder, without number and suffix.
        files: one shard, or loose files with their names.
        loose: whether they are loose files.
        number: of the first output shard.
    """

    output: str
    files: tuple[tuple[Path, str], ...]
    loose: bool
    number: int = 0

    @property
    def source(self) -> str:
        """Where it lies, for people."""
        return str(self.files[0][0]) if not self.loose else f"{self.files[0][0]} to {self.files[-1][0]}"

    def shard(self, piece: int) -> str:
        """The name of an output shard, without suffix."""
        return f"{self.output}-{self.number + piece:05}"

    def identity(self) -> dict[str, Any]:
        """What identifies it: the names, sizes and times of its files."""
        files = [[str(path), *file_identity(path).values()] for path, _ in self.files]
        return {"output": self.output, "number": self.number, "files": files}

    def items(self, suffixes: Collection[str], column: str | None) -> Iterator[Item]:
        """Its items, in their order.

        Args:
            suffixes: of the medium.
            column: of tables, the one that holds the bytes.
        """
        path = self.files[0][0]
        if self.loose:
            for path, name in self.files:
                yield Item(name, str(path), path)
        elif path.suffix.lower() == ".parquet":
            yield from table_items(path, min(suffixes), column)
        else:
            yield from tar_items(path, suffixes)


def is_shard(path: Path) -> bool:
    """Whether a file is a shard by its name."""
    return path.name.lower().endswith((*_TARS, ".parquet"))


def units_of(files: Sequence[FoundFile], shard_size: int) -> list[Unit]:
    """The units of a collection, in the order of the inputs, loose files after shards.

    Args:
        files: shards and loose files.
        shard_size: most items of an output shard.
    """
    units: list[Unit] = []
    loose: list[tuple[Path, str]] = []
    taken = {_LOOSE}
    for file in files:
        if not is_shard(file.path):
            loose.append((file.path, f"{file.output}{file.path.suffix}"))
            continue
        base, count = str(file.output), 1
        output = base
        while output.casefold() in taken:
            count += 1
            output = f"{base}~{count}"
        taken.add(output.casefold())
        units.append(Unit(output, ((file.path, file.path.name),), loose=False))
    for number, start in enumerate(range(0, len(loose), shard_size)):
        units.append(Unit(_LOOSE, tuple(loose[start : start + shard_size]), loose=True, number=number))
    return units
