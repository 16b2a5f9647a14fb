"""Units to output shards, by one model: what a worker does, in this process or on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenthrift.shards.items import Item, ItemError, unique_keys
from tokenthrift.shards.units import Unit

if TYPE_CHECKING:
    from tokenthrift.tokenize import FileTokenizer

__all__ = ["Piece", "TokenSpec", "Worker"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSpec:
    """Everything that decides what a job writes, and where it runs, as plain data.

    Attributes:
        options: those of the model's system.
        column: of tables, the one that holds the bytes.
        shard_size: most items of an output shard.
    """

    model: str
    revision: str | None = None
    budget: str | None = None
    options: Mapping[str, Any]
    column: str | None = None
    shard_size: int = 1000
    batch_size: int = 8
    device: str | None = None
    threads: int | None = None

    @property
    def decisive(self) -> dict[str, Any]:
        """What a shard depends on besides the input and the model; nothing of batches and machines."""
        options = {name: value for name, value in self.options.items() if name != "model"}
        return {"budget": self.budget, "options": options, "column": self.column, "shard_size": self.shard_size}

    def tokenizer(self) -> FileTokenizer:
        """Loads the model.

        Raises:
            ValueError, OSError, ImportError: it cannot be used.
        """
        import torch

        from tokenthrift.devices import working_device
        from tokenthrift.models import load
        from tokenthrift.tokenize import planner_class

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load(self.model, revision=self.revision, device=working_device(self.device))
        made: Any = planner_class(type(model), self.model)
        return made(model, argparse.Namespace(**self.options))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Piece:
    """An output shard.

    Attributes:
        number: in its unit.
        rows: a row for each item.
        last: whether the unit ends with it.
        again: whether something failed that another run may do: no fault of an item.
    """

    number: int
    rows: Sequence[Mapping[str, Any]]
    last: bool
    again: bool = False


class Worker:
    """Makes pieces of units.

    Args:
        spec: the job.
    """

    def __init__(self, spec: TokenSpec) -> None:
        from tokenthrift.budget import TokenBudget

        self.spec, self.tokenizer = spec, spec.tokenizer()
        self.budget = TokenBudget.parse(spec.budget)

    def __call__(
        self, work: Sequence[tuple[int, Unit, frozenset[int]]], stop: Callable[[], bool] = bool
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of units, with the indices of these.

        Args:
            work: indices, units, and the numbers of pieces that are there already.
            stop: asked after every batch; where it says so, the piece in hand is left.
        """
        for index, unit, there in work:
            for piece in self.pieces(unit, there, stop):
                yield index, piece

    def rows(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Rows of a unit, each as soon as its batch is done, for readers of lines."""
        items = _numbered(unit, unit.items(self.tokenizer.suffixes, self.spec.column), self.tokenizer.noun)
        for row in self._rows(items):
            del row["key"]
            yield row

    def pieces(
        self, unit: Unit, there: frozenset[int] = frozenset(), stop: Callable[[], bool] = bool
    ) -> Iterator[Piece]:
        """Pieces of a unit; see `__call__`."""
        items = _numbered(unit, unit.items(self.tokenizer.suffixes, self.spec.column), self.tokenizer.noun)
        number, following = 0, next(items, None)
        while following is not None:
            part = _Part(following, items, self.spec.shard_size)
            if number in there:
                for _ in part:
                    pass
            else:
                rows = []
                for row in self._rows(part):
                    rows.append(row)
                    if stop() and len(rows) % self.spec.batch_size == 0:
                        return
                again = any(str(row.get("failed", "")).startswith("tokenizing failed: ") for row in rows)
                yield Piece(number, rows, last=part.following is None, again=again)
            number, following = number + 1, part.following

    def _rows(self, items: Iterable[tuple[int, Item]]) -> Iterator[dict[str, Any]]:
        from tokenthrift.tokenize import token_rows

        key_of, keys = unique_keys(), []

        def noted() -> Iterator[Item]:
            for number, item in items:
                keys.append(key_of(item.name, number))
                yield item

        for i, row in enumerate(token_rows(self.tokenizer, noted(), self.budget, self.spec.batch_size)):
            yield {"key": keys[i], **row}


class _Part:
    """The items of one piece, and then the first one of the next."""

    def __init__(self, first: tuple[int, Item], items: Iterator[tuple[int, Item]], size: int) -> None:
        self.following: tuple[int, Item] | None = None
        self._first, self._items, self._size = first, items, size

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        yield self._first
        yield from islice(self._items, self._size - 1)
        self.following = next(self._items, None)


def _numbered(unit: Unit, items: Iterator[Item], noun: str) -> Iterator[tuple[int, Item]]:
    empty = True
    for number, item in enumerate(items):
        empty = False
        yield number, item
    if empty:
        yield 0, Item(None, unit.source, error=ItemError(f"there is no {noun} in it"))
