"""`tokenthrift transcribe`: recordings to files of text, or to a table on the screen.

Everything that can be wrong with the command itself is found before the model is loaded; from then on only single
recordings fail. Results go to stdout, the progress bar and complaints to stderr.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.evaluation.wer import ErrorCount
from tokenthrift.jobs.journal import FOLDER, locked
from tokenthrift.jobs.keys import model_identity
from tokenthrift.jobs.stopping import Stop
from tokenthrift.transcription.dry import dry_run
from tokenthrift.transcription.engine import JobSpec
from tokenthrift.transcription.options import MANIFEST, make_parser
from tokenthrift.transcription.outputs import Outputs, Task
from tokenthrift.transcription.page import page_entry, page_entry_of_row, write_page
from tokenthrift.transcription.recordings import ManifestError, Recording, find_recordings, shard_of
from tokenthrift.transcription.references import References, read_references
from tokenthrift.transcription.report import Bar, Tally, print_summary, results_table
from tokenthrift.transcription.results import FileTranscript
from tokenthrift.transcription.writers import WRITERS, manifest_row, one_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after `transcribe`; those of the process if None.

    Returns:
        The exit status.
    """
    arguments = make_parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    try:
        recordings, found = find_recordings(
            arguments.input, any_suffix=arguments.any_suffix, manifest_root=arguments.manifest_root
        )
        if remark := found.remark("name them or use --any-suffix"):
            _complain(console, "note", remark)
        spec = _spec(arguments)
        with ExitStack() as stack:
            return _Job(arguments, spec, recordings, len(found.left_out), console, stack).run()
    except (ValueError, OSError, ImportError) as error:
        return _wrong(console, error)
    except KeyboardInterrupt:
        return _interrupted(console)


class _Job:
    """One run of the command, once its inputs are known."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        spec: JobSpec,
        recordings: list[Recording],
        left_out: int,
        console: Console,
        stack: ExitStack,
    ) -> None:
        self.arguments, self.spec, self.console, self.stack = arguments, spec, console, stack
        formats = list(dict.fromkeys(arguments.format or (["txt"] if arguments.out_dir else [])))
        self.manifest = "jsonl" in formats
        formats = [form for form in formats if form != "jsonl"]
        if self.manifest and arguments.out_dir is None:
            raise ValueError("--format jsonl is one file for all recordings, so it needs --out-dir")
        self.shard = arguments.shard
        if self.shard is not None:
            recordings = [recordings[i] for i in shard_of(recordings, *self.shard)]
        self.recordings = recordings
        self.writes = arguments.out_dir is not None or bool(formats)
        name = "journal" if self.shard is None else f"journal-{self.shard[0]}-of-{self.shard[1]}"
        self.outputs = Outputs(
            arguments.out_dir, formats, overwrite=arguments.overwrite, journal_name=name, writers=WRITERS
        )
        self._check_single_files([*self._lists(), *(recording.path for recording in recordings)])
        self.tally = Tally(left_out=left_out)
        self.failed_rows: dict[int, dict[str, Any]] = {}
        self.page: list[dict[str, Any]] = []

    def run(self) -> int:
        """All of it; the exit status."""
        tasks = self._tasks()
        todo = [i for i, task in enumerate(tasks) if task is not None]
        self.tally.skipped, self.tally.kept = len(tasks) - len(todo), self.outputs.kept
        references = _references(self.arguments, self.recordings, todo)
        if self.arguments.dry_run:
            return dry_run(self.spec, [self.recordings[i] for i in todo], self.tally.skipped)
        # All paths share their first folders; where they differ is worth the width of the table.
        paths = [os.path.dirname(os.path.abspath(self.recordings[i].path)) for i in todo]
        table, add_row = results_table(os.path.commonpath(paths) if paths else "", references is not None)
        stop, status = Stop(), 0
        try:
            with stop.on_signals():
                if todo:
                    self._work(tasks, todo, references, add_row, stop)
        except BudgetError as error:
            return _wrong(self.console, error)
        except KeyboardInterrupt:
            status = _interrupted(self.console)
        if stop.signaled and not status:
            status = _interrupted(self.console)
        whole = self._close(tasks, complete=not stop.asked and not status)
        out = Console(highlight=False)
        if not out.is_terminal and "COLUMNS" not in os.environ:
            out.width = 120
        if table.row_count:
            out.print(table, "")
        print_summary(out, self.tally, references, self.arguments.out_dir)
        return status or (1 if self.tally.failed or not whole else 0)

    def _lists(self) -> list[Path]:
        """The inputs as they were given, manifests among them, and the file of references."""
        return [Path(name) for name in (*self.arguments.input, self.arguments.references) if name]

    def _check_single_files(self, inputs: Sequence[Path]) -> None:
        """Raises ValueError where the page or the manifest would replace an input or a file of others."""
        out_dir, page = self.arguments.out_dir, self.arguments.report
        manifest = out_dir / self.outputs.manifest_name if self.manifest else None
        if page is not None and page.is_dir():
            raise ValueError(f"--report {page} is a folder")
        taken = {os.path.realpath(path) for path in inputs}
        for path in (manifest, page):
            if path is not None and os.path.realpath(path) in taken:
                raise ValueError(f"{path} is one of the inputs and would be overwritten")
        if manifest is not None and page is not None and os.path.realpath(manifest) == os.path.realpath(page):
            raise ValueError(f"--report {page} is the file of --format jsonl")
        foreign = manifest is not None and manifest.exists() and not (out_dir / FOLDER).exists()
        if foreign and not self.arguments.overwrite:
            raise ValueError(f"{manifest} is of no job; give another --out-dir, or --overwrite to replace it")

    def _tasks(self) -> list[Task | None]:
        """What is to be done, with the output folders held."""
        if not self.writes:
            return [Task(recording, Path(), {}, "") for recording in self.recordings]
        roots = self.outputs.roots(self.recordings)
        if self.arguments.out_dir is not None and not self.arguments.dry_run:
            try:
                self.arguments.out_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--out-dir {self.arguments.out_dir}: {error.strerror}") from error
        identity = model_identity(self.spec.model, self.spec.revision)
        options = self.spec.options
        for name in ("align", "draft_model"):
            if options[name] is not None:
                options[name] = model_identity(options[name], None)
        if not self.arguments.dry_run:
            for root in roots:
                self.stack.enter_context(locked(root, self.shard))
            self.outputs.clean(roots)
        page = [] if self.arguments.report is None else [self.arguments.report]
        return self.outputs.tasks(self.recordings, identity, options, [*self._lists(), *page])

    def _work(
        self,
        tasks: Sequence[Task | None],
        todo: Sequence[int],
        references: References | None,
        add_row: Callable[[FileTranscript, ErrorCount | None], None],
        stop: Stop,
    ) -> None:
        """Transcribes, writes, counts and scores."""
        recordings = [self.recordings[i] for i in todo]
        results = self._results(recordings, stop)
        rows: dict[int, tuple[FileTranscript, ErrorCount | None]] = {}
        shown = 0
        with Bar(len(todo), self.console) as bar:
            for index, result in results(bar.advance):
                task = tasks[todo[index]]
                assert task is not None
                result = self._flagged(result)
                if self.writes:
                    result = self.outputs.write(task, result)
                self.tally.add(result)
                if result.error is not None:
                    self.failed_rows[todo[index]] = manifest_row(result)
                    stop.asked = stop.asked or self.arguments.fail_fast
                for note in result.notes:
                    _complain(self.console, "note", f"{result.path}: {note}")
                if result.error is not None:
                    _complain(self.console, "failed", f"{result.path}: {result.error}")
                errors = references.score(result) if references is not None else None
                if self.arguments.report is not None:
                    self.page.append(page_entry(todo[index], result, references))
                if not self.writes or references is not None:
                    rows[index] = result, errors
                    while shown in rows:
                        add_row(*rows.pop(shown))
                        shown += 1
        for index in sorted(rows):
            add_row(*rows[index])

    def _results(
        self, recordings: list[Recording], stop: Stop
    ) -> Callable[[Callable[[float, float], None]], Iterator[tuple[int, FileTranscript]]]:
        """The chosen engine, with the model loaded."""
        if self.arguments.engine == "ray":
            from tokenthrift.transcription.ray_engine import RayEngine

            engine = RayEngine(self.spec, self.arguments.workers, self.arguments.ray_address)
            return lambda report: engine.finished(recordings, report, stop)
        with self.console.status(f"loading {escape(one_line(self.spec.model))}"):
            transcriber = self.spec.transcriber()
        self.tally.started = time.perf_counter()
        return lambda report: transcriber.finished(recordings, report, stop)

    def _flagged(self, result: FileTranscript) -> FileTranscript:
        least = self.spec.flag_below
        confidence = result.confidence if result.segments else None
        if least is None or confidence is None or confidence >= least:
            return result
        self.tally.flagged += 1
        return replace(result, notes=(*result.notes, f"a confidence of {confidence:.2f}, below {least:g}"))

    def _close(self, tasks: Sequence[Task | None], *, complete: bool) -> bool:
        """The manifest and the page, and the journals put in order; whether all of it could be written."""
        steps: list[tuple[Path, Callable[[], None]]] = []
        if self.manifest:
            rows = (self._row(i) for i in range(len(tasks)))
            path = self.arguments.out_dir / self.outputs.manifest_name
            steps.append((path, lambda: self.outputs.write_manifest(row for row in rows if row is not None)))
        if self.arguments.report is not None:
            steps.append((self.arguments.report, lambda: self._write_page(len(tasks))))
        if self.writes and complete:
            steps.append(((self.arguments.out_dir or Path()) / FOLDER, self.outputs.close))
        whole = True
        for path, write in steps:
            try:
                write()
            except OSError as error:  # A full disk, say, which is no wrong usage; the recordings' own files are whole.
                whole = False
                _complain(self.console, "failed", f"{path} cannot be written: {error.strerror or error}")
        return whole

    def _write_page(self, count: int) -> None:
        """The page of all recordings, with those that were done before."""
        done = {entry["index"] for entry in self.page}
        for i in range(count):
            row = self._row(i) if i not in done and self.writes else None
            if row is not None:
                self.page.append(page_entry_of_row(i, row))
        write_page(self.arguments.report, sorted(self.page, key=lambda entry: int(entry["index"])))

    def _row(self, index: int) -> dict[str, Any] | None:
        return self.failed_rows.get(index) or self.outputs.row(index)


def _references(
    arguments: argparse.Namespace, recordings: Sequence[Recording], todo: Sequence[int]
) -> References | None:
    """What was said, from `--references` and from the manifests among the inputs."""
    inside = any(recording.reference is not None for recording in recordings)
    if arguments.references is None:
        return read_references() if inside and todo else None
    if arguments.references:
        return read_references(Path(arguments.references))
    beside = sorted({recordings[i].path.parent / MANIFEST for i in todo})
    found = [manifest for manifest in beside if manifest.is_file()]
    if todo and not found and not inside:
        raise ManifestError(f"--references: there is no {MANIFEST} beside the recordings; name the file")
    return read_references(*found)


def _spec(arguments: argparse.Namespace) -> JobSpec:
    """The job as plain data.

    Raises:
        BudgetError: a budget is none.
        ValueError, OSError: the model takes no draft, or `--draft-model` can be none.
    """
    names = {field.name for field in fields(JobSpec)}
    spec = JobSpec(**{name: value for name, value in vars(arguments).items() if name in names})
    TokenBudget.parse(spec.budget)
    _ = spec.decode
    spec.check_draft_model()
    return spec


def _wrong(console: Console, error: Exception) -> int:
    message = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        message = f"{error.filename}: {error.strerror}"
    _complain(console, "error", message)
    return 2


def _interrupted(console: Console) -> int:
    console.print("interrupted", style="bold red")
    return 130


def _complain(console: Console, kind: str, message: str) -> None:
    # A log wants a line per complaint, however long; a person wants words kept whole.
    console.print(Text.assemble((f"{kind}: ", "bold red"), one_line(message)), soft_wrap=not console.is_terminal)
