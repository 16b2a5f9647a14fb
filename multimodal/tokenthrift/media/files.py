"""Files, folders and patterns to the files of a medium, a place for the output of each, and what was left out.

A file that is named is always tried, whatever its suffix. A folder is walked with its subfolders; a pattern that the
shell did not expand is expanded here, `**` included; both take the suffixes of the medium and nothing hidden. What is
in a folder, holds the medium by its content and has another suffix, or none, is left out and named, or read with
`any_suffix`; other files are counted. Linked folders are followed, each real folder once, so that no circle of links
leads round.

An argument that leads to nothing is an error before any work starts: a misspelt name is better found now than after the
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

from tokenthrift.media.kinds import Kind, kind_of
from tokenthrift.media.suffixes import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES

__all__ = ["FoundFile", "FoundFiles", "InputError", "find_files"]

# Which content is of a medium, by its suffixes: a container of film may hold nothing but sound.
_CONTENT: tuple[tuple[Collection[str], tuple[Kind, ...]], ...] = (
    (MEDIA_SUFFIXES, ("sound", "film")),
    (VIDEO_SUFFIXES, ("film", "animation")),
    (IMAGE_SUFFIXES, ("picture", "animation")),
)
_NAMED = 6


class InputError(ValueError):
    """An argument that names no file of the medium."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file to work on.

    Attributes:
        path: The file, as it was named.
        output: Where its output goes, relative to the output folder and without the suffix of the format.
        argument: Which of the arguments led to it, from 0.
    """

    path: Path
    output: Path
    argument: int = 0


class FoundFiles(list[FoundFile]):
    """Files to work on.

    Attributes:
        left_out: Files in the folders given that hold the medium and have another suffix.
        others: How many files in those folders hold something else.
    """

    def __init__(self, files: Iterable[FoundFile], left_out: Sequence[Path] = (), others: int = 0) -> None:
        super().__init__(files)
        self.left_out, self.others = list(left_out), others

    def remark(self, advice: str = "name them") -> str:
        """What was left out, for a person, or nothing."""
        if not self.left_out:
            return ""
        names = ", ".join(map(str, self.left_out[:_NAMED]))
        more = f" and {len(self.left_out) - _NAMED} more" if len(self.left_out) > _NAMED else ""
        return f"{len(self.left_out)} left out: {names}{more}; {advice}"


@dataclass(slots=True)
class _Search:
    """What one call looks for, and what it passed by."""

    suffixes: Collection[str]
    kinds: tuple[Kind, ...]
    any_suffix: bool
    besides: Collection[str]
    left_out: dict[str, Path]
    others: set[str]

    def takes(self, path: Path) -> bool:
        """Whether a file in a folder is one to work on; the others are noted."""
        if path.name.startswith("."):
            return False
        if path.suffix.lower() in self.suffixes or path.suffix.lower() in self.besides:
            return True
        if not path.is_file() or kind_of(path) not in self.kinds:
            self.others.add(os.path.realpath(path))
            return False
        if not self.any_suffix:
            self.left_out.setdefault(os.path.realpath(path), path)
        return self.any_suffix


def find_files(
    arguments: Iterable[str],
    suffixes: Collection[str],
    noun: str,
    *,
    any_suffix: bool = False,
    besides: Collection[str] = (),
) -> FoundFiles:
    """Finds all files of a medium; one that several arguments lead to appears once, at its first place.

    Links count as what they lead to. Within one argument they do not: equal files of a repository in the cache of the
    Hub are links to one file, and each of them is expected to have its output.

    Args:
        arguments: Files, folders, and patterns with `*`, `?`, `[...]` or `**`. A path that exists is never taken for a
            pattern.
        suffixes: Those of the medium, in lower case, with their dots.
        noun: What messages call such a file.
        any_suffix: Take files in folders by their content where their suffix is unknown.
        besides: Suffixes of other files to take, such as shards that hold many of the medium.

    Returns:
        Files in the order of the arguments, sorted by path within a folder or pattern, each with its own output; and
        what the folders hold besides.

    Raises:
        InputError: An argument does not exist, matches nothing or holds no file of the medium; all such are named.
    """
    kinds = next((kinds for known, kinds in _CONTENT if known == suffixes), ())
    search = _Search(suffixes, kinds, any_suffix, besides, {}, set())
    found: dict[str, tuple[Path, Path, int]] = {}
    first: dict[str, int] = {}  # real path to the first argument that leads there
    problems = []
    for number, argument in enumerate(arguments):
        path = Path(argument)
        if path.is_dir():
            before = len(search.left_out)
            try:
                paths = sorted(_walk(path, search))
                base, problem = path, f"{argument}: a folder without {noun}s"
                if len(search.left_out) > before:
                    passed = FoundFiles((), list(search.left_out.values())[before:])
                    problem += f" of a known suffix; {passed.remark('name them or use --any-suffix')}"
            except OSError as error:
                base, paths, problem = path, [], f"{error.filename}: cannot be read: {error.strerror}"
        elif os.path.lexists(path):
            base, paths, problem = path.parent, [path], ""
        elif glob.has_magic(argument):
            base, paths = _fixed_part(argument), sorted(_expand(argument, search))
            problem = f"{argument}: no {noun} matches this pattern"
        else:
            base, paths, problem = path, [], f"{argument}: no such file or folder"
        if not paths:
            problems.append(problem)
        for path in paths:
            if first.setdefault(os.path.realpath(path), number) == number:
                found.setdefault(os.path.abspath(path), (path, path.relative_to(base), number))
    if problems:
        raise InputError("; ".join(problems))
    outputs = [entry[1] for entry in found.values()]
    if len(set(outputs)) < len(outputs):
        # The same path below two arguments: mirror from the folder that holds them all.
        root = os.path.commonpath([os.path.dirname(path) for path in found])
        outputs = [Path(os.path.relpath(path, root)) for path in found]
    names = _without_suffixes(outputs)
    files = [FoundFile(path, name, number) for (path, _, number), name in zip(found.values(), names, strict=True)]
    left_out = [path for place, path in search.left_out.items() if place not in first]
    return FoundFiles(files, left_out, len(search.others - first.keys()))


def _walk(folder: Path, search: _Search) -> Iterator[Path]:
    """Files of the medium in a folder and below: first what lies there itself, then behind links, no folder twice."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for parent, folders, names in os.walk(start, onerror=fail):
                real = os.path.realpath(parent)
                if real in seen:
                    folders[:] = []
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                links += [Path(parent, name) for name in folders if os.path.islink(os.path.join(parent, name))]
                yield from (path for path in (Path(parent, name) for name in sorted(names)) if search.takes(path))
        waiting = [link for link in links if os.path.realpath(link) not in seen]


def _expand(pattern: str, search: _Search) -> Iterator[Path]:
    for match in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(match) and search.takes(Path(match)):
            yield Path(match)


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
