"""The durable job of `tokenthrift tokenize --out-dir`: shards in, shards out, killed at any moment and gone on with.

As the job of transcripts: an output shard appears whole (temporary file, fsync, rename), then a line in the journal
says so under a key of its input, the model and the options; one process, or one for each part, writes to a folder; only
the driver writes, also with workers on Ray, so that the bytes are those of the local engine. What is left of an earlier
run behind the last shard of a unit is removed. `shards.jsonl` lists what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from tokenthrift.jobs.journal import Journal, check_inside, write_bytes
from tokenthrift.jobs.keys import key_of
from tokenthrift.shards.units import Unit
from tokenthrift.shards.work import Piece, TokenSpec, Worker
from tokenthrift.shards.writing import FORMATS, Columns, count_rows

__all__ = ["LISTING", "ShardJob"]

LISTING: Final = "shards.jsonl"


class ShardJob:
    """One run over the units of a collection, with the output folder held.

    Args:
        root: the output folder.
        units: all units that this run is to have done.
        spec: what decides the rows.
        model: identity of the model.
        form: of the shards, see `FORMATS`.
        columns: of tables.
        journal: name of the journal; parts have one each.
        overwrite: do again what is done, and replace files of others.
    """

    def __init__(
        self,
        root: Path,
        units: Sequence[Unit],
        spec: TokenSpec,
        model: str,
        form: str,
        columns: Columns,
        *,
        journal: str = "journal",
        overwrite: bool = False,
    ) -> None:
        self.root, self.units, self.spec, self.overwrite = root, units, spec, overwrite
        self._model, self._columns, self._form = model, columns, form
        self._suffix, self._encode = FORMATS[form]
        self._journal = Journal(root, journal)
        self._whole = journal == "journal"  # of a part, the shards behind its own are of other parts
        self.listing = root / LISTING.replace(".", f"{journal.removeprefix('journal')}.")
        self._identities = [unit.identity() for unit in units]
        self._written: set[tuple[int, int]] = set()
        self._again: dict[int, dict[int, dict[str, Any]]] = {}

    def todo(self) -> list[tuple[int, Unit, frozenset[int]]]:
        """Units that are not done, with their indices and what is done of them; drafts of a killed run are removed.

        Raises:
            FileExistsError: a shard would replace a file that no run has written.
        """
        self._journal.clean(self.listing)
        found = []
        for index, unit in enumerate(self.units):
            rows = {} if self.overwrite else self._done(index)
            if not any(row["last"] and len(rows) == piece + 1 for piece, row in rows.items()):
                found.append((index, unit, frozenset(rows)))
                self._check_free(self._name(unit, 0))
        return found

    def run(
        self,
        todo: Sequence[tuple[int, Unit, frozenset[int]]],
        stop: Callable[[], bool],
        engine: Literal["local", "ray"] = "local",
        *,
        workers: int = 2,
        address: str | None = None,
    ) -> Iterator[tuple[str, Piece]]:
        """Makes and writes what `todo` named; names of shards with what is in them, each once it is on the disk.

        Raises:
            OSError: a shard cannot be written, or would replace a file that no run has written.
        """
        for index, piece in self._pieces(todo, stop, engine, workers, address):
            if (index, piece.number) in self._written:
                continue  # a worker died and another did it again
            yield self._write(index, piece), piece
            if stop():
                return

    def _pieces(
        self,
        todo: Sequence[tuple[int, Unit, frozenset[int]]],
        stop: Callable[[], bool],
        engine: str,
        workers: int,
        address: str | None,
    ) -> Iterator[tuple[int, Piece]]:
        if engine == "ray":
            from tokenthrift.jobs.on_ray import map_on_ray

            return map_on_ray(Worker, (self.spec,), todo, workers=workers, address=address)
        return Worker(self.spec)(todo, stop)

    def _write(self, index: int, piece: Piece) -> str:
        unit = self.units[index]
        name = self._name(unit, piece.number)
        path, key = self.root / name, self._key(index, piece.number)
        check_inside(path, self.root)
        self._check_free(name)
        data = self._encode(piece.rows, self._columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_inside(path, self.root)
        self._journal.begin(key, [name])
        write_bytes(path, data)
        row = {"last": piece.last, **count_rows(piece.rows)}
        if piece.again:
            self._again.setdefault(index, {})[piece.number] = row
        else:
            self._journal.finish(key, [name], row)
        self._written.add((index, piece.number))
        return name

    def close(self, *, complete: bool) -> dict[str, int]:
        """Writes the listing, and in a run that was not ended early puts the journal in order; sums over all shards."""
        lines, keys = [], []
        for index, unit in enumerate(self.units):
            rows = {**self._done(index), **self._again.get(index, {})}
            for piece, row in sorted(rows.items()):
                counts = {name: value for name, value in row.items() if name != "last"}
                lines.append({"shard": self._name(unit, piece), "source": unit.source, **counts})
                keys.append(self._key(index, piece))
            if complete and rows and self._whole:
                self._remove_behind(unit, max(rows))
        text = "".join(f"{json.dumps(line, ensure_ascii=True)}\n" for line in lines)
        write_bytes(self.listing, text.encode())
        if complete:
            self._journal.compact(keys)
        names = ("items", "completed", "failed", "native", "tokens")
        return {name: sum(int(line[name]) for line in lines) for name in names} | {"shards": len(lines)}

    def _done(self, index: int) -> dict[int, Mapping[str, Any]]:
        """What is done of a unit, by the number of the piece; a killed run, or a piece to do again, leaves gaps."""
        rows: dict[int, Mapping[str, Any]] = {}
        for piece in range(1 << 30):
            name = self._name(self.units[index], piece)
            if not self._journal.owns(name):
                break
            entry = self._journal.done(self._key(index, piece))
            if entry is not None and (self.root / name).is_file():
                rows[piece] = entry["row"]
                if entry["row"]["last"]:
                    break
        return rows

    def _remove_behind(self, unit: Unit, last: int) -> None:
        """Removes shards of an earlier run behind the last one: the collection was longer then."""
        if unit.loose and any(other.loose and other.number > unit.number for other in self.units):
            return
        for piece in range(last + 1, 1 << 30):
            name = self._name(unit, piece)
            if not self._journal.owns(name):
                return
            (self.root / name).unlink(missing_ok=True)

    def _check_free(self, name: str) -> None:
        if not self.overwrite and not self._journal.owns(name) and (self.root / name).exists():
            raise FileExistsError(0, "a file that no run has written stands there; --overwrite replaces it", name)

    def _name(self, unit: Unit, piece: int) -> str:
        return f"{unit.shard(piece)}.{self._suffix}"

    def _key(self, index: int, piece: int) -> str:
        decisive = {**self.spec.decisive, "format": self._form}
        return key_of({**self._identities[index], "piece": piece}, self._model, decisive)
