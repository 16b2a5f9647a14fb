"""Files, folders and patterns to the files of a medium, and a place for the output of each.

A file that is named is always tried, whatever its suffix. A folder is walked with its subfolders; a pattern that the
shell did not expand is expanded here, `**` included; both take only the suffixes of the medium and nothing hidden. An
argument that leads to nothing is an error before any work starts: a misspelt name is better found now than after the
night. Output names mirror the folders below what was given, and two files never share one: WhisperX writes by base name
alone, so that `a/x.wav` overwrites `b/x.wav`.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FoundFile", "InputError", "find_files"]


class InputError(ValueError):
    """An argument that names no file of the medium."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to work on.

    Attributes:
        path: The file, as it was named.
        output: Where its output goes, relative to the output folder and without the suffix of the format.
    """

    path: Path
    output: Path


def find_files(arguments: Iterable[str], suffixes: Collection[str], noun: str) -> list[FoundFile]:
    """Finds all files of a medium; one that is named twice appears once, at its first place.

    Args:
        arguments: Files, folders, and patterns with `*`, `?`, `[...]` or `**`. A path that exists is never taken for a
            pattern.
        suffixes: Those of the medium, in lower case, with their dots.
        noun: What messages call such a file.

    Returns:
        Files in the order of the arguments, sorted by path within a folder or pattern, each with its own output.

    Raises:
        InputError: An argument does not exist, matches nothing or holds no file of the medium; all such are named.
    """
    found: dict[str, tuple[Path, Path]] = {}
    problems = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            base, problem = path, f"{argument}: a folder without {noun}s"
            try:
                paths = sorted(_walk(path, suffixes))
            except OSError as error:
                paths, problem = [], f"{error.filename}: cannot be read: {error.strerror}"
        elif os.path.lexists(path):
            base, paths, problem = path.parent, [path], ""
        elif glob.has_magic(argument):
            base, paths = _fixed_part(argument), sorted(_expand(argument, suffixes))
            problem = f"{argument}: no {noun} matches this pattern"
        else:
            base, paths, problem = path, [], f"{argument}: no such file or folder"
        if not paths:
            problems.append(problem)
        for path in paths:
            found.setdefault(os.path.abspath(path), (path, path.relative_to(base)))
    if problems:
        raise InputError("; ".join(problems))
    paths = [path for path, _ in found.values()]
    outputs = [relative for _, relative in found.values()]
    if len(set(outputs)) < len(outputs):
        # The same path below two arguments: mirror from the folder that holds them all.
        root = os.path.commonpath([os.path.dirname(path) for path in found])
        outputs = [Path(os.path.relpath(path, root)) for path in found]
    return [FoundFile(path, output) for path, output in zip(paths, _without_suffixes(outputs), strict=True)]


def _walk(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Files of the medium in a folder and below; links to folders are not followed, since they may lead back."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if _is_one(name, suffixes):
                yield Path(parent, name)


def _expand(pattern: str, suffixes: Collection[str]) -> Iterator[Path]:
    for match in glob.iglob(pattern, recursive=True):
        if _is_one(os.path.basename(match), suffixes) and not os.path.isdir(match):
            yield Path(match)


def _is_one(name: str, suffixes: Collection[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = Path(pattern).parts[:-1]
    wild = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:wild])


def _without_suffixes(paths: Sequence[Path]) -> list[Path]:
    """Output names: the suffix goes, except where that would make two files of a folder the same."""
    stems = Counter(path.with_suffix("") for path in paths)
    crowded = {stem.parent for stem, count in stems.items() if count > 1}
    return [path if path.parent in crowded else path.with_suffix("") for path in paths]
