"""WebDataset shards: tars in which files of one name and several suffixes are a sample.

Read header by header with the standard library's parser of headers, forward and in constant memory. The usual readers
(`webdataset`, Ray Data's `read_webdataset`) open any compression, believe every size, take a sample as a whole into
memory, decode pickles among the members, and end a damaged shard early without a word. Here no member is unpacked under
its name; a link, a device, a sparse file, a name that leads elsewhere and a size beyond the end of the shard are failed
items; headers are bounded; and a shard that is damaged or cut short has a failed item that says how much was lost.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final

from tokenthrift.shards.items import MAX_ITEM_BYTES, Item, ItemError, safe_name

__all__ = ["tar_items"]

_BLOCK: Final = tarfile.BLOCKSIZE
_LONGEST_HEADER: Final = 1 << 20
_PIECE: Final = 1 << 20
_COMPRESSED: Final = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


class _Bounded:
    """A file in which no header is longer than it may be, whatever it states of itself."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell, self.seek, self.mode = file, file.tell, file.seek, "rb"
        self.name = file.name

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.HeaderError(f"a header of {size} bytes")
        return self.file.read(size)


def tar_items(path: Path, suffixes: Collection[str]) -> Iterator[Item]:
    """The members of a medium, in their order; other members of samples are passed over.

    Args:
        path: the shard.
        suffixes: of the medium, in lower case, with their dots.

    Yields:
        An item for each member, and a failed one for what could not be read.
    """
    try:
        with path.open("rb") as file:
            yield from _members(path, file, path.stat().st_size, suffixes)
    except OSError as error:
        yield _lost(path, f"cannot be read: {error.strerror}")


def _members(path: Path, file: IO[bytes], size: int, suffixes: Collection[str]) -> Iterator[Item]:
    start = file.read(8)
    if form := next((name for magic, name in _COMPRESSED if start.startswith(magic)), None):
        yield _lost(path, f"a tar compressed with {form}, which could unpack to any size; unpack it first")
        return
    offset = 0
    try:
        tar = tarfile.TarFile(fileobj=_Bounded(file), mode="r", errorlevel=1)  # type: ignore[arg-type]
    except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
        yield _lost(path, f"no tar, or damaged: {error}")
        return
    while True:
        file.seek(offset)
        tar.pax_headers = {}  # global ones hold for the next member, and must not pile up
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.HeaderError as error:
            # Which of its kinds it is, is for the module itself to know.
            if type(error).__name__ == "EmptyHeaderError":
                yield _lost(path, f"cut short: it ends at byte {size} without an end mark")
            elif type(error).__name__ != "EOFHeaderError":
                yield _lost(path, f"damaged at byte {offset} of {size}; the rest is lost: {error}")
            elif rest := _first_byte(file, offset):
                yield _lost(path, f"bytes behind the end mark are not read: from byte {rest} of {size}")
            return
        except (tarfile.TarError, ValueError, RecursionError, OverflowError, KeyError) as error:
            yield _lost(path, f"damaged at byte {offset} of {size}; the rest is lost: {error}")
            return
        following = tar.offset
        short = member.offset_data + max(0, member.size) > size
        if member.size < 0 or following <= offset:
            yield _lost(path, f"damaged at byte {offset} of {size}; the rest is lost: a size of {member.size}")
            return
        name = PurePosixPath(member.name)
        if name.suffix.lower() in suffixes and not name.name.startswith(".") and not member.isdir():
            yield _item(path, file, member, short=short)
        if short:
            yield _lost(path, f"cut short: a member ends at byte {member.offset_data + member.size} of {size}")
            return
        offset = following


def _item(path: Path, file: IO[bytes], member: tarfile.TarInfo, *, short: bool) -> Item:
    source, name = f"{path}/{member.name}", safe_name(member.name)
    reason = None
    if name is None:
        reason = "its name would lead out of the shard"
    elif member.issparse():
        reason = "a sparse file"
    elif not member.isreg():
        reason = "a link or a device, not a file"
    elif member.size > MAX_ITEM_BYTES:
        reason = f"{member.size} bytes, more than {MAX_ITEM_BYTES}"
    elif short:
        reason = "cut short"
    if reason is not None:
        return Item(name, source, error=ItemError(reason))

    def copy() -> Iterator[bytes]:
        file.seek(member.offset_data)
        left = member.size
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise ItemError("cut short")
            left -= len(piece)
            yield piece

    return Item(name, source, copy=copy)


def _first_byte(file: IO[bytes], offset: int) -> int:
    """Where something begins behind the end mark; 0 if nothing does."""
    file.seek(offset)
    while piece := file.read(_PIECE):
        if rest := piece.lstrip(b"\0"):
            return offset + len(piece) - len(rest)
        offset += len(piece)
    return 0


def _lost(path: Path, reason: str) -> Item:
    return Item(None, str(path), error=ItemError(reason))
