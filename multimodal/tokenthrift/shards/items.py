"""An item of a collection: its name, and how its bytes become a file that a media reader opens.

Nothing is ever unpacked under a name that a collection gives: what is inside of a shard goes to one file of ours, in a
folder of ours, that the next item overwrites. It is copied in pieces, so that memory does not grow with its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["MAX_ITEM_BYTES", "Item", "ItemError", "safe_name", "unique_keys"]

MAX_ITEM_BYTES: Final = 1 << 32
"""Most bytes of an item inside of a shard; more is a failed item."""

_LONGEST: Final = 200


class ItemError(ValueError):
    """An item, or the rest of a shard, that cannot be had; `reason` says why, fit for a report."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Item:
    """Something to tokenize.

    Attributes:
        name: below the collection, with its suffix; safe to write below another folder. None where it has none.
        source: where it lies, for people: a path, of what is inside of a shard with the name or row behind it.
        path: the file, of loose ones.
        copy: the bytes in pieces, of what is inside of a shard; to be called before the next item is asked for.
        error: why it cannot be had, known beforehand.
    """

    name: str | None
    source: str
    path: Path | None = None
    copy: Callable[[], Iterator[bytes | memoryview]] | None = None
    error: ItemError | None = None

    def fetch(self, folder: Path) -> Path:
        """The item as a file.

        Args:
            folder: where the bytes go of what is inside of a shard.

        Raises:
            ItemError: it cannot be had.
        """
        if self.error is not None:
            raise self.error
        if self.path is not None:
            return self.path
        assert self.copy is not None
        path = folder / f"item{PurePosixPath(self.name or '').suffix}"
        with path.open("wb") as file:
            for piece in self.copy():
                file.write(piece)
        return path


def safe_name(name: str) -> str | None:
    """A name in a shard as one that can be a member of another, or None where it would lead elsewhere."""
    parts = [part for part in name.split("/") if part != "."]
    unsafe = name.startswith("/") or "\\" in name or re.search(r"[\x00-\x1f\x7f]", name) or re.match(r"[A-Za-z]:", name)
    if unsafe or ".." in parts or not parts or "" in parts or len(name) > _LONGEST * 5:
        return None
    return "/".join(parts)


def unique_keys() -> Callable[[str | None, int], str]:
    """A function that gives items of a shard keys of their own, also on file systems that ignore case.

    A key is the name without suffix. WebDataset cuts a name at its first dot, so that a key has none.
    """
    taken: set[str] = set()

    def key_of(name: str | None, number: int) -> str:
        base = f"item-{number:09}"
        if name is not None:
            path = PurePosixPath(re.sub("[\ud800-\udfff]", "\ufffd", name))
            base = str(path.with_name(path.stem.replace(".", "_")[:_LONGEST] or base))
        key, count = base, 1
        while key.casefold() in taken:
            count += 1
            key = f"{base}~{count}"
        taken.add(key.casefold())
        return key

    return key_of
