"""What a person sees of a run: the bar on stderr while it goes on, the table and the summary on stdout."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tokenthrift.evaluation.wer import ErrorCount
from tokenthrift.transcription.references import References
from tokenthrift.transcription.results import FileTranscript
from tokenthrift.transcription.writers import one_line

__all__ = ["Bar", "Tally", "print_summary", "results_table"]


@dataclass(slots=True)
class Tally:
    """Counts of a run. The real-time factor is the time it took over the audio it transcribed: below 1 is faster."""

    done: int = 0
    failed: int = 0
    silent: int = 0
    flagged: int = 0
    skipped: int = 0
    kept: int = 0
    left_out: int = 0
    audio_seconds: float = 0.0
    native: int = 0
    used: int = 0
    rounds: int = 0
    windows: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: FileTranscript) -> None:
        """Counts a result; a failed one only as a failure."""
        if result.error is not None:
            self.failed += 1
            return
        self.done += 1
        self.silent += result.status == "no speech"
        self.audio_seconds += result.seconds
        self.native += result.usage.native
        self.used += result.usage.used
        self.rounds += result.usage.rounds
        self.windows += result.windows

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.started


class Bar:
    """Progress in files, with the audio done, the real-time factor and the time left.

    A bar where stderr is a terminal; elsewhere a plain line, at most every `LINE_SECONDS`.
    """

    LINE_SECONDS = 10.0

    def __init__(self, files: int, console: Console, clock: Callable[[], float] = time.perf_counter) -> None:
        """Sets up a bar for a number of files."""
        self._console, self._clock = console, clock
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal,
        )
        self._files = files
        self._task = self._progress.add_task("", total=files, state=f"0/{files} files")
        self._audio_seconds = self._share = 0.0
        self._started = self._line = clock()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, share: float, seconds: float) -> None:
        """Adds the share of a file that was done and its seconds of audio."""
        self._share += share
        self._audio_seconds += seconds
        state = f"{int(self._share + 1e-6)}/{self._files} files"
        if self._audio_seconds:
            factor = (self._clock() - self._started) / self._audio_seconds
            state += f", {clock(self._audio_seconds)} of audio, RTF {_number(factor)}"
        self._progress.update(self._task, completed=self._share, state=state)
        now = self._clock()
        if not self._console.is_terminal and now - self._line >= self.LINE_SECONDS:
            self._line = now
            left = (now - self._started) * (self._files / max(self._share, 1e-9) - 1)
            self._console.print(f"{state}, {clock(max(0.0, left))} left", soft_wrap=True)


def results_table(
    folder: str, with_references: bool
) -> tuple[Table, Callable[[FileTranscript, ErrorCount | None], None]]:
    """A table of transcripts and the function that adds a row to it; paths are shown relative to a folder."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("recording", overflow="fold", max_width=32)
    for name in ("seconds", "tokens", "rounds", *(["WER"] if with_references else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("transcript", overflow="fold", ratio=1)

    def add(result: FileTranscript, errors: ErrorCount | None) -> None:
        if result.error is not None:
            numbers = ["-"] * 3
            text = f"[red]failed: {escape(one_line(result.error))}"
        else:
            rounds = f"{result.usage.rounds / result.windows:.1f}" if result.windows else "0"
            numbers = [f"{result.seconds:.1f}", str(result.usage.used), rounds]
            text = escape(result.text) or "[dim](nothing said)"
        if with_references:
            numbers.append("-" if errors is None else _percent(errors))
        table.add_row(escape(one_line(os.path.relpath(result.path, folder))), *numbers, text)

    return table, add


def print_summary(console: Console, tally: Tally, references: References | None, out_dir: Path | None) -> None:
    """Prints the counts of a run.

    Args:
        console: Where to.
        tally: The counts.
        references: Error rates, if there were references.
        out_dir: Where the files are, if any were written.
    """
    skipped = f", {tally.skipped} skipped (their files exist)" if tally.skipped else ""
    skipped += f", {tally.silent} without speech" if tally.silent else ""
    skipped += f", {tally.flagged} flagged" if tally.flagged else ""
    skipped += f", {tally.kept} files of others kept (--overwrite replaces them)" if tally.kept else ""
    left_out = f", {tally.left_out} left out (named above)" if tally.left_out else ""
    lines = {"files": f"{tally.done} done, {tally.failed} failed{skipped}{left_out}"}
    if tally.done:
        seconds, audio = tally.seconds, tally.audio_seconds
        factor = f", real-time factor {_number(seconds / audio)}" if audio else ""
        lines["audio"] = f"{clock(audio)} ({audio:.1f} s)"
        lines["tokens"] = f"{tally.used} used of {tally.native} native"
        lines["mean rounds"] = f"{tally.rounds / max(1, tally.windows):.2f} over {tally.windows} windows"
        lines["time"] = f"{seconds:.1f} s{factor}"
    if references is not None:
        words, rates = references.words, ""
        if references.scored:
            rates = f"WER {_percent(words)} ({words.errors} errors in {words.total} words), "
            rates += f"CER {_percent(references.characters)}, "
        lines["accuracy"] = f"{rates}{references.scored} files with a reference"
    if out_dir is not None:
        lines["output"] = one_line(out_dir)
    for name, text in lines.items():
        console.print(f"[bold]{name:11}[/]  {escape(text)}", soft_wrap=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds; hours only where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float) -> str:
    """Two digits that say something, whatever the size."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _percent(errors: ErrorCount) -> str:
    return f"{100 * errors.rate:.1f} %"
