"""Files to tokens: what a system does with the files of its medium, and the rows of figures that come of it.

Which files a model reads and which options it has besides is its system's business: a `FileTokenizer`, named in
`tokenthrift.registry`. The commands `tokenize` and `plan` are in `tokenthrift.commands`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tokenthrift.budget import TokenBudget, TokenUsage
from tokenthrift.config import ConfigError
from tokenthrift.hub import HubModel
from tokenthrift.registry import resolve, those_with

__all__ = [
    "FilePlanner",
    "FileTokenizer",
    "NotRead",
    "failed",
    "planner_class",
    "reason_of",
    "token_rows",
    "usage_row",
]


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
    """A `FilePlanner` of a system that turns files into tokens."""

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


def reason_of(error: ValueError) -> str:
    """What is wrong with a file, without its name."""
    return getattr(error, "reason", None) or str(error)


def failed(path: Path, error: ValueError) -> dict[str, Any]:
    """The row of a file that cannot be read."""
    return {"file": str(path), "failed": reason_of(error)}


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
    tokenizer: FileTokenizer, paths: Sequence[Path], budget: TokenBudget, batch_size: int
) -> Iterator[dict[str, Any]]:
    """The figures of files, in their order; one that cannot be read has `failed` instead, and the others go on."""
    for start in range(0, len(paths), batch_size):
        rows: dict[Path, dict[str, Any]] = {}
        items = []
        for path in paths[start : start + batch_size]:
            try:
                items.append((path, tokenizer.read(path)))
            except ValueError as error:
                rows[path] = failed(path, error)
        if items:
            with torch.inference_mode():
                found = tokenizer.tokenize([item for _, item in items], budget)
            rows |= {path: {"file": str(path), **row} for (path, _), row in zip(items, found, strict=True)}
        yield from (rows[path] for path in paths[start : start + batch_size])
