"""Where the files of a job go: beside the recordings or below one folder, never anywhere else, never over a recording.

A file that no journal names as the job's own belongs to somebody and stays, unless `overwrite` is given. What a link
would lead out of the folder is refused, and fails its recording alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tokenthrift.jobs.journal import FOLDER, Journal, check_inside, write_bytes
from tokenthrift.jobs.keys import file_identity, key_of
from tokenthrift.media.files import InputError
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.results import FileTranscript
from tokenthrift.transcription.writers import WRITERS, manifest_row, printable

__all__ = ["Outputs", "Task"]

_SUFFIXES: Final = {"karaoke": "karaoke.vtt"}


@dataclass(frozen=True, slots=True)
class Task:
    """A recording, the files to write for it by format, and the key of the work."""

    recording: Recording
    root: Path
    files: Mapping[str, Path]
    key: str

    @property
    def names(self) -> list[str]:
        """The files relative to the root."""
        return [os.path.relpath(path, self.root) for path in self.files.values()]


class Outputs:
    """The output folders of a job, each with its journal.

    Args:
        out_dir: The folder of all outputs; beside the recordings if None.
        formats: What is written of each recording.
        overwrite: Do again what is done, and replace files of others.
        journal_name: Of the journals; shards have one each.
        writers: Formats to functions.
    """

    def __init__(
        self,
        out_dir: Path | None,
        formats: Iterable[str],
        *,
        overwrite: bool = False,
        journal_name: str = "journal",
        writers: Mapping[str, Callable[[FileTranscript], str]] = WRITERS,
    ) -> None:
        self.out_dir, self.formats, self.overwrite = out_dir, list(formats), overwrite
        self._journal_name, self._writers = journal_name, writers
        self._journals: dict[Path, Journal] = {}
        self.kept = 0
        self._order: list[tuple[Path, str, Path]] = []
        self._beside: dict[str, Path] = {}

    def journal(self, root: Path) -> Journal:
        """The journal of an output folder."""
        if root not in self._journals:
            self._journals[root] = Journal(root, self._journal_name)
        return self._journals[root]

    def roots(self, recordings: Iterable[Recording]) -> list[Path]:
        """The folders that will be written to."""
        if self.out_dir is not None:
            return [self.out_dir]
        return sorted({self._root(recording) for recording in recordings})

    def _root(self, recording: Recording) -> Path:
        """The folder to write to; where several ways lead to one folder, the first, as it has one lock and journal."""
        if self.out_dir is not None:
            return self.out_dir
        folder = recording.path.parent
        return self._beside.setdefault(os.path.realpath(folder), folder)

    def clean(self, roots: Iterable[Path]) -> None:
        """Removes drafts that a killed process left behind."""
        for root in roots:
            self.journal(root).clean(root / self.manifest_name)

    def tasks(
        self, recordings: Iterable[Recording], model: str, options: dict[str, Any], taken: Iterable[Path] = ()
    ) -> list[Task | None]:
        """What is to be done for each recording; None where all of it is done.

        Args:
            recordings: All of the run.
            model: Its identity.
            options: That a result depends on.
            taken: Files besides the recordings that no output may replace.

        Raises:
            InputError: An output would replace a recording or another file that is taken.
        """
        recordings = list(recordings)
        inputs = (recording.path for recording in recordings if recording.samples is None)
        protected = {os.path.realpath(path) for path in (*inputs, *taken)}
        tasks: list[Task | None] = []
        for recording in recordings:
            root = self._root(recording)
            name = recording.output if self.out_dir is not None else Path(recording.output.name)
            base = root / name
            files = {form: base.with_name(f"{base.name}.{_SUFFIXES.get(form, form)}") for form in self.formats}
            for path in files.values():
                if os.path.realpath(path) in protected:
                    raise InputError(
                        f"{path} is an input or the report and would be overwritten; give another --out-dir"
                    )
            key = key_of(_identity(recording), model, options)
            self._order.append((root, key, recording.path))
            journal = self.journal(root)
            if not self.overwrite:
                done = journal.done(key)
                present = {form for form, path in files.items() if os.path.lexists(path)}
                # What stands there and is not the job's own stays.
                foreign = {form for form in present if not journal.owns(os.path.relpath(files[form], root))}
                self.kept += len(foreign)
                files = {form: path for form, path in files.items() if form not in foreign}
                whole = done is not None and {*_names(files, root)} <= {*done["files"]} and files.keys() <= present
                if whole or (foreign and not files):
                    tasks.append(None)
                    continue
            tasks.append(Task(recording, root, files, key))
        return tasks

    def write(self, task: Task, result: FileTranscript) -> FileTranscript:
        """Writes a result's files and notes them; one that cannot be written has failed.

        A failed recording has its JSON, which says why, and is tried again by the next run. What the job wrote for it
        before, when the input or the options were others, would look like its text and is removed.
        """
        files, stale = dict(task.files), list[Path]()
        if result.error is not None:
            stale = [path for form, path in files.items() if form != "json"]
            files = {form: path for form, path in files.items() if form == "json"}
        journal = self.journal(task.root)
        try:
            texts = {path: self._writers[form](result).encode("utf-8") for form, path in files.items()}
            for path in texts:
                path.parent.mkdir(parents=True, exist_ok=True)
                check_inside(path, task.root)
            if texts:
                journal.begin(task.key, [os.path.relpath(path, task.root) for path in texts])
            for path in stale:
                if journal.owns(os.path.relpath(path, task.root)):
                    check_inside(path, task.root)
                    path.unlink(missing_ok=True)
            for path, data in texts.items():
                write_bytes(path, data)
            if result.error is None:
                journal.finish(task.key, task.names, manifest_row(result))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            where = getattr(error, "filename", None) or next(iter(files.values()), task.root)
            return replace(result, error=f"{where} cannot be written: {reason}", error_type=type(error).__name__)
        return result

    def row(self, index: int) -> dict[str, Any] | None:
        """The manifest's row of a recording, by its index in `tasks`, if it is done."""
        root, key, path = self._order[index]
        entry = self.journal(root).done(key)
        return None if entry is None else {**entry["row"], "audio_filepath": printable(path)}

    @property
    def manifest_name(self) -> str:
        """The file of all results: `transcripts.jsonl`, and of a shard `transcripts-1-of-4.jsonl`."""
        return f"transcripts{self._journal_name.removeprefix('journal')}.jsonl"

    def write_manifest(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes one line for each recording, in their order."""
        assert self.out_dir is not None
        data = "".join(printable(json.dumps(row, ensure_ascii=False, allow_nan=False)) + "\n" for row in rows)
        write_bytes(self.out_dir / self.manifest_name, data.encode("utf-8"))

    def close(self) -> None:
        """Puts the journals in order, once all is done."""
        for root in {root for root, *_ in self._order}:
            if (root / FOLDER).is_dir():
                self.journal(root).compact(dict.fromkeys(key for folder, key, _ in self._order if folder == root))


def _identity(recording: Recording) -> dict[str, Any]:
    """What identifies an input: its path, size and time of change, and the part of it."""
    return {
        "output": printable(recording.output),
        **file_identity(recording.path),
        "offset": recording.offset,
        "duration": recording.duration,
        "reference": recording.reference,
    }


def _names(files: Mapping[str, Path], root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in files.values()]
