"""What the job works on: a file, a part of one, or samples in memory, each with the path of its output.

Files, folders and patterns are found by `media.files`. A manifest holds a JSON object a line, with the names of NeMo's
manifests and the open ASR leaderboard's: `audio_filepath`, and if wanted `duration` and `offset` in seconds and `text`
that was said. Paths in it are relative to its folder and must stay inside of a root, which is that folder unless
another is chosen: a manifest of strangers cannot make the job read `/etc`. A line that says nothing usable is a failed
recording and stops nothing. `-` reads paths from standard input, one a line.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from tokenthrift.media.files import FoundFiles, InputError, find_files
from tokenthrift.media.suffixes import MEDIA_SUFFIXES

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ManifestError", "Recording", "find_recordings", "read_manifest", "shard_of"]

MANIFEST_SUFFIXES: Final = (".jsonl", ".json")
_LINE_BYTES: Final = 1 << 20
_SECONDS: Final = 1e6
_NAME: Final = 200


class ManifestError(ValueError):
    """A manifest, or a line of one, that says nothing usable."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Something to transcribe.

    Attributes:
        path: The file; only a name where there are `samples`, and "m.jsonl, line 3" where that line is no entry.
        output: Where its output goes, below the output folder and without the suffix of the format.
        samples: (n,), (channels, n) or (n, channels) samples in place of the file, floats or whole numbers.
        rate: Samples per second of `samples`.
        offset: Seconds of the file to leave out.
        duration: Seconds to transcribe; to the end if None.
        reference: What was said.
        error: Why it cannot be transcribed, known beforehand.
    """

    path: Path
    output: Path = Path()
    samples: NDArray[Any] | None = None
    rate: int = 0
    offset: float = 0.0
    duration: float | None = None
    reference: str | None = None
    error: str | None = None


def find_recordings(
    arguments: Iterable[str],
    *,
    any_suffix: bool = False,
    manifest_root: Path | None = None,
    stdin: IO[str] | None = None,
) -> tuple[list[Recording], FoundFiles]:
    """All recordings of a command's arguments, each with an output name of its own.

    Args:
        arguments: Files, folders, patterns, manifests (`.jsonl`, `.json`), and `-`.
        any_suffix: As in `find_files`.
        manifest_root: The folder in which all that a manifest names must lie; its own folder if None.
        stdin: What `-` reads; standard input if None.

    Returns:
        Recordings in the order given, and what `find_files` says of the folders.

    Raises:
        InputError: An argument leads to nothing.
        ManifestError: A manifest cannot be read, or holds nothing.
    """
    plain: list[tuple[int, str]] = []
    manifests: list[tuple[int, Path]] = []
    for number, argument in enumerate(arguments):
        if argument == "-":
            lines = (line.rstrip("\r\n").removeprefix("\ufeff") for line in _listed(stdin or sys.stdin))
            plain += [(number, line) for line in lines if line.strip()]
        elif argument.endswith(MANIFEST_SUFFIXES) and Path(argument).is_file():
            manifests.append((number, Path(argument)))
        else:
            plain.append((number, argument))
    found = FoundFiles(())
    if plain or not manifests:
        if not plain:
            raise InputError("standard input names no recording")
        found = find_files([name for _, name in plain], MEDIA_SUFFIXES, "recording", any_suffix=any_suffix)
    placed = [(plain[file.argument][0], Recording(file.path, file.output)) for file in found]
    for number, manifest in manifests:
        entries = list(read_manifest(manifest, manifest_root))
        if not entries:
            raise ManifestError(f"{manifest}: holds no entry")
        placed += [(number, entry) for entry in entries]
    return _distinct([recording for _, recording in sorted(placed, key=itemgetter(0))]), found


def read_manifest(manifest: Path, root: Path | None = None) -> Iterator[Recording]:
    """The entries of a manifest, read line by line.

    Args:
        manifest: The file.
        root: The folder in which all entries must lie; the manifest's own if None.

    Yields:
        A recording for each line that is not empty; one with an `error` where the line says nothing usable.

    Raises:
        ManifestError: The file cannot be read.
    """
    folder = Path(os.path.realpath(manifest.parent))
    inside = folder if root is None else Path(os.path.realpath(root))
    try:
        with manifest.open("rb") as file:
            number = 0
            while line := file.readline(_LINE_BYTES + 1):
                number += 1
                if len(line) > _LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_LINE_BYTES)
                    yield _bad(manifest, number, f"longer than {_LINE_BYTES} bytes")
                elif line.strip():
                    yield _entry(line, manifest, number, folder, inside)
    except OSError as error:
        raise ManifestError(f"{manifest}: cannot be read: {error.strerror}") from error


def shard_of(recordings: Sequence[Recording], number: int, of: int) -> list[int]:
    """The indices of the recordings that one of several processes works on: every `of`-th, beginning with `number`."""
    return list(range(number - 1, len(recordings), of))


def _entry(line: bytes, manifest: Path, number: int, folder: Path, root: Path) -> Recording:
    try:
        data = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return _bad(manifest, number, f"no JSON object: {str(error)[:_NAME]}")
    if not isinstance(data, dict):
        return _bad(manifest, number, "no JSON object")
    name, text = data.get("audio_filepath"), data.get("text")
    if not isinstance(name, str) or not name or "\0" in name:
        return _bad(manifest, number, "audio_filepath is no path")
    if text is not None and not isinstance(text, str):
        return _bad(manifest, number, "text is no text")
    offset, duration = _seconds(data, "offset", 0.0), _seconds(data, "duration", None)
    if isinstance(offset, str) or isinstance(duration, str):
        return _bad(manifest, number, str(offset if isinstance(offset, str) else duration))
    path = folder / name
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        return _bad(manifest, number, f"audio_filepath: {error}")
    if not real.is_relative_to(root):
        return _bad(manifest, number, f"{name[:_NAME]} lies outside of {root}; --manifest-root allows another folder")
    if os.path.isdir(real):
        return _bad(manifest, number, f"{name[:_NAME]} is a folder")
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return _bad(manifest, number, f"{name[:_NAME]} is no recording")
    output = Path(os.path.relpath(os.path.normpath(path), folder))
    if ".." in output.parts:
        output = real.relative_to(root)
    # A whole file has no offset, and NeMo writes its duration all the same: only an offset makes a part of it.
    part = "offset" in data and data["offset"] is not None and (offset or duration is not None)
    output = output.with_suffix("")
    return Recording(
        # A symbolic link inside the root is read where it leads to, which was checked.
        manifest.parent / name if not os.path.islink(path) else real,
        output.with_name(f"{output.name}@{offset:.3f}") if part and offset else output,
        offset=offset or 0.0,
        duration=duration if part else None,
        reference=text,
    )


def _seconds(data: dict[str, Any], name: str, default: float | None) -> float | None | str:
    """A number of seconds, or what is wrong with it."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name} is no number"
    if isinstance(value, int) and abs(value) > _SECONDS or not math.isfinite(value) or not 0 <= value <= _SECONDS:
        return f"{name} is not between 0 and {_SECONDS:.0f} seconds"
    if name == "duration" and value == 0:
        return "duration is 0"
    return float(value)


def _bad(manifest: Path, number: int, reason: str) -> Recording:
    """A recording that is named after the line, as there is no file to name it after."""
    name, output = f"{manifest.name}, line {number}", Path(f"{manifest.stem}-line-{number}")
    return Recording(manifest.with_name(name), output, error=reason)


def _listed(stdin: IO[str]) -> Iterator[str]:
    """Lines of a list; names are bytes, and those that are not UTF-8 are names too."""
    binary: IO[bytes] | None = getattr(stdin, "buffer", None)
    return iter(stdin) if binary is None else (os.fsdecode(line) for line in binary)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _distinct(recordings: list[Recording]) -> list[Recording]:
    """No two recordings share an output name, also where file systems do not distinguish capitals.

    That holds below one output folder and beside the recordings, where names alone count: two patterns may lead to
    one folder by different ways, links among them.
    """

    @cache
    def real(folder: Path) -> str:
        return os.path.realpath(folder)

    taken: set[str] = set()
    counts: dict[tuple[Path, str], int] = {}
    distinct = []
    for recording in recordings:
        output, suffix = recording.output, recording.path.suffix
        count = counts.get((output, suffix), 1)
        while not taken.isdisjoint(names := _output_names(real(recording.path.parent), output)):
            count += 1
            addition = suffix if count == 2 else f"~{count - 1}"
            output = recording.output.with_name(f"{recording.output.name}{addition or '~1'}")
        # Thousands of lines may name one file, and none of them begins to count anew.
        counts[recording.output, suffix] = count
        taken |= names
        distinct.append(recording if output == recording.output else replace(recording, output=output))
    return distinct


def _output_names(folder: str, output: Path) -> set[str]:
    """What the files of a recording are called without their formats, of which "karaoke.vtt" has two parts."""
    both = str(output), os.path.join(folder, output.name)
    return {name.casefold() + part for name in both for part in ("", ".karaoke")}
