"""What was done, so that a job goes on where it was killed: an append-only journal of JSON lines in the output folder.

A line is written after the files of a recording are in place, and names the key of what was done (input, model,
options) with the row that the manifest will hold. Before the first file is put in place, another line says which files
are about to be: they are the job's own, to be replaced when it runs again, and drafts of them that a killed process
left behind are removed. A line that is torn, or no JSON, is ignored. Only positions are kept in memory. When a run ends
in peace the journal is written anew with what holds, in the order of the inputs, so that a run that was killed and
resumed leaves the same bytes as one that was not.

One process writes to an output folder, or one for each shard; the lock is the file system's own, so that a killed
process holds nothing. The second process says who is at work.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

__all__ = ["FOLDER", "BusyError", "Journal", "check_inside", "locked", "write_bytes"]

FOLDER: Final = ".tokenthrift"
_FORMAT: Final = 1
_LONGEST_NAME: Final = 240  # bytes; file systems take 255


class BusyError(ValueError):
    """Another process writes to the output folder."""


class Journal:
    """The journal of one output folder.

    Args:
        root: The output folder.
        name: Of the journal; shards have one each.
    """

    def __init__(self, root: Path, name: str = "journal") -> None:
        self.root = root
        self.path = root / FOLDER / f"{name}.jsonl"
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._own: set[str] = set()
        self._pending: dict[str, list[str]] = {}
        self._alone = name == "journal"  # what other shards have begun, they may be writing now
        folder = root / FOLDER
        # Journals of other shards count too; ours is read last, so that its entries take precedence.
        others = sorted(path for path in folder.glob("*.jsonl") if path != self.path) if folder.is_dir() else []
        for path in [*others, self.path]:
            if path.is_file():
                self._read(path)

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            offset = 0
            for line in file:
                entry = _parse(line)
                if entry is not None:
                    key, files = entry["key"], [str(name) for name in entry["files"]]
                    self._own.update(files)
                    if "row" in entry:
                        self._offsets[key] = path, offset
                        self._pending.pop(key, None)
                    else:
                        self._offsets.pop(key, None)
                        if path == self.path or self._alone:
                            self._pending[key] = files
                offset += len(line)

    def done(self, key: str) -> dict[str, Any] | None:
        """The entry of what was done under a key, or None."""
        if key not in self._offsets:
            return None
        path, offset = self._offsets[key]
        with path.open("rb") as file:
            file.seek(offset)
            return _parse(file.readline())

    def owns(self, name: str) -> bool:
        """Whether a file, relative to the root, was written by a job and may be replaced."""
        return name in self._own

    def clean(self, *others: Path) -> None:
        """Removes drafts that a killed process left behind: of the journal, of what it began, and of other files."""
        began = (self.root / name for files in self._pending.values() for name in files)
        for path in [self.path, *others, *began]:
            for draft in path.parent.glob(f"{glob.escape(_draft_name(path))}.????????.tmp"):
                draft.unlink(missing_ok=True)

    def begin(self, key: str, files: Iterable[str]) -> None:
        """Says that files are about to be put in place; what was done under the key is so no more."""
        names = list(files)
        if (before := self.done(key)) is not None:
            names = list(dict.fromkeys([*names, *before["files"]]))  # a failed recording writes fewer
            del self._offsets[key]
        self._own.update(names)
        if self._pending.get(key) != names:
            self._pending[key] = names
            self._append({"format": _FORMAT, "key": key, "files": names})

    def finish(self, key: str, files: Iterable[str], row: dict[str, Any]) -> None:
        """Says that a recording is done."""
        offset = self._append({"format": _FORMAT, "key": key, "files": list(files), "row": row})
        self._offsets[key] = self.path, offset
        self._pending.pop(key, None)

    def compact(self, keys: Iterable[str]) -> None:
        """Writes the journal anew with what holds: this run in the order of `keys`, then runs with other inputs."""
        here, taken = dict.fromkeys(keys), set[str]()
        own = [key for key, (path, _) in self._offsets.items() if path == self.path]
        with _replacing(self.path) as file:
            for key in here:
                if (entry := self._entry(key)) is not None:
                    file.write(_line(entry))
                    taken.update(entry["files"])
            # What this run has replaced is another's no more.
            for key in dict.fromkeys([*own, *self._pending]):
                entry = None if key in here else self._entry(key)
                if entry is not None and taken.isdisjoint(entry["files"]):
                    file.write(_line(entry))
        self._offsets, self._pending = {}, {}
        self._read(self.path)

    def _entry(self, key: str) -> dict[str, Any] | None:
        """What was done under a key; of what has failed, the files, which are the job's own."""
        entry = self.done(key)
        if entry is None and key in self._pending:
            entry = {"format": _FORMAT, "key": key, "files": self._pending[key]}
        return entry

    def _append(self, entry: dict[str, Any]) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            offset = file.tell()
            if offset and not _ends_with_newline(self.path):
                # The line before was torn by a kill: this one begins anew.
                file.write(b"\n")
                offset += 1
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        return offset


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that at every moment it is absent, as it was, or complete, also after kill -9 or a power cut.

    The folder must exist. A killed process may leave a hidden `.NAME.XXXXXXXX.tmp` behind (a digest in place of a long
    name), never half a `path`.

    Raises:
        OSError: The disk is full, the folder read-only and the like; `path` is as it was.
    """
    with _replacing(path) as file:
        file.write(data)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A draft that becomes the file once all is written and on the disk."""
    draft = path.with_name(f"{_draft_name(path)}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _draft_name(path: Path) -> str:
    """What names of drafts of a file begin with; of a file whose name leaves no room for more, a digest of it."""
    name = os.fsencode(path.name)
    return f".{path.name}" if len(name) <= _LONGEST_NAME else f".{hashlib.sha256(name).hexdigest()[:32]}"


def check_inside(path: Path, root: Path) -> None:
    """Refuses a file whose folder is elsewhere because of a link.

    Raises:
        OSError: it is.
    """
    if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(root)):
        raise OSError(0, f"a link leads out of {root}", str(path))


@contextmanager
def locked(root: Path, shard: tuple[int, int] | None = None) -> Iterator[None]:
    """Holds the output folder, or a shard of it.

    Raises:
        BusyError: Another process writes there; the message says which.
    """
    from filelock import FileLock, Timeout

    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = "job" if shard is None else f"shard-{shard[0]}-of-{shard[1]}"
    of = None if shard is None else f"-of-{shard[1]}.lock"
    lock = FileLock(folder / f"{name}.lock")
    holder = folder / f"{name}.holder.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(f"{root}: {_holder(holder)} writes there; wait, or give another --out-dir") from None
    try:
        # A whole run and a shard, or shards of another number, would do the same files twice.
        for other in sorted(folder.glob("*.lock")):
            if other.name != f"{name}.lock" and (of is None or not other.name.endswith(of)):
                probe = FileLock(other)
                try:
                    probe.acquire(timeout=0)
                except Timeout:
                    who = _holder(other.with_suffix(".holder.json"))
                    raise BusyError(f"{root}: {who} writes there; wait, or give another --out-dir") from None
                probe.release()
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=True, sort_keys=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = (
        isinstance(entry, dict)
        and entry.get("format") == _FORMAT
        and isinstance(entry.get("key"), str)
        and isinstance(entry.get("files"), list)
        and isinstance(entry.get("row", {}), dict)
    )
    return entry if whole else None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
