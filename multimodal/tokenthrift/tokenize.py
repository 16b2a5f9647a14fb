"""Files to tokens: what a system does with the files of its medium, and the rows of figures that come of it.

Which files a model reads and which options it has besides is its system's business: a `FileTokenizer`, named in
`tokenthrift.registry`. The commands `tokenize` and `plan` are in `tokenthrift.commands`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import torch

from tokenthrift.budget import BudgetError, TokenBudget, TokenUsage
from tokenthrift.config import ConfigError
from tokenthrift.hub import HubModel
from tokenthrift.registry import resolve, those_with

if TYPE_CHECKING:
    from tokenthrift.shards.items import Item

__all__ = [
    "USAGE_COLUMNS",
    "Column",
    "FilePlanner",
    "FileTokenizer",
    "NotRead",
    "failed",
    "planner_class",
    "reason_of",
    "token_rows",
    "usage_row",
]

Column: TypeAlias = Literal["int", "float", "text", "ints", "regions"]
"""What a figure is; regions have the share of a clip and the position of each code."""

USAGE_COLUMNS: Final[Mapping[str, Column]] = {"native": "int", "cap": "int", "tokens": "int", "error": "float"}
"""Those of `usage_row`."""

_SURROGATES: Final = re.compile("[\ud800-\udfff]")  # bytes of a name that are no UTF-8


class NotRead(ValueError):
    """A file that is whole, but of a kind that the model does not read; the message says why."""


class FilePlanner(Protocol):
    """What a system does with the files of its medium before it runs; made of a model and the parsed options.

    Attributes:
        noun: what a file is called, in the singular.
        suffixes: under which such files are looked for in folders.
    """

    noun: str
    suffixes: frozenset[str]

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Adds the system's own options of `tokenize`."""

    def plan(self, path: Path, budget: TokenBudget) -> TokenUsage:
        """What a file will cost at most, from its header; the model has no memory here.

        Raises:
            NotRead: the model does not read such files.
            ValueError: the file cannot be read (an error of `tokenthrift.media`), or the budget cannot be honored.
        """


class FileTokenizer(FilePlanner, Protocol):
    """A `FilePlanner` of a system that turns files into tokens.

    Attributes:
        columns: all figures that a row may have.
    """

    columns: Mapping[str, Column]

    def read(self, path: Path) -> Any:
        """Reads a file.

        Raises:
            ValueError: it cannot be read.
        """

    def tokenize(self, items: Sequence[Any], budget: TokenBudget) -> list[dict[str, Any]]:
        """Plain figures for each item, `usage_row` first, then what the system adds.

        Args:
            items: what `read` gave.
            budget: ceilings for each of them.
        """


def usage_row(usage: TokenUsage) -> dict[str, Any]:
    """The figures that every system reports."""
    row: dict[str, Any] = {"native": usage.native, "cap": usage.cap, "tokens": usage.used}
    return row if usage.error is None else {**row, "error": round(usage.error, 6)}


def reason_of(error: Exception) -> str:
    """What is wrong with a file, without its name."""
    known = getattr(error, "reason", None) if isinstance(error, ValueError) else None
    return known or (str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")


def failed(source: str, error: Exception) -> dict[str, Any]:
    """The row of an item that cannot be read."""
    name, reason = (_SURROGATES.sub("\ufffd", text) for text in (source, reason_of(error)))
    return {"file": name, "status": "failed", "failed": reason, "type": type(error).__name__}


def planner_class(kind: type[HubModel], source: str) -> type[FilePlanner]:
    """What the system of a model does with files.

    Raises:
        ConfigError: it reads none.
    """
    target = those_with("files").get(kind.system)
    if target is None:
        raise ConfigError(f"{source}: a model of {kind.__name__} reads no files")
    found: type[FilePlanner] = resolve(target)
    return found


def token_rows(
    tokenizer: FileTokenizer, items: Iterable[Item], budget: TokenBudget, batch_size: int
) -> Iterator[dict[str, Any]]:
    """The figures of items, in their order; one that cannot be read has `failed` instead, and the others go on.

    A batch that fails (out of memory, say) is halved, down to the item that fails alone.
    """
    waiting = iter(items)
    with TemporaryDirectory(prefix="tokenthrift-") as folder:
        while batch := list(_read(tokenizer, islice(waiting, batch_size), Path(folder))):
            able = [item for _, item in batch if not isinstance(item, Exception)]
            found = iter(_tokenize(tokenizer, able, budget) if able else ())
            for source, item in batch:
                row = failed(source, item) if isinstance(item, Exception) else next(found)
                status = "failed" if "failed" in row else "completed"
                yield {"file": _SURROGATES.sub("\ufffd", source), "status": status, **row}


def _read(tokenizer: FileTokenizer, items: Iterable[Item], folder: Path) -> Iterator[tuple[str, Any]]:
    """What was read of each item, or why it could not be."""
    for item in items:
        try:
            yield item.source, tokenizer.read(item.fetch(folder))
        except ImportError:
            raise
        except Exception as error:  # Whatever else a decoder may raise concerns this item alone.
            yield item.source, error


def _tokenize(tokenizer: FileTokenizer, items: list[Any], budget: TokenBudget) -> list[dict[str, Any]]:
    try:
        with torch.inference_mode():
            return tokenizer.tokenize(items, budget)
    except (BudgetError, ImportError):
        raise
    except Exception as error:
        if len(items) == 1:
            return [{"failed": f"tokenizing failed: {type(error).__name__}: {error}", "type": type(error).__name__}]
        # Cached blocks of the failed batch would make the halves fail as well.
        torch.cuda.empty_cache()
        half = len(items) // 2
        return [row for part in (items[:half], items[half:]) for row in _tokenize(tokenizer, part, budget)]
