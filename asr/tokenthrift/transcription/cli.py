"""`tokenthrift transcribe`: recordings to files of text, or to a table on the screen.

Everything that can be wrong with the command itself is found before the model is loaded; from then on only single
recordings fail. Results go to stdout, the progress bar and complaints to stderr.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from tokenthrift.budget import BudgetError, DecodeBudget, TokenBudget
from tokenthrift.commands.arguments import add_any_suffix, add_model_option, count, number, working_device
from tokenthrift.evaluation.wer import ErrorCount
from tokenthrift.media.files import InputError, find_files
from tokenthrift.media.suffixes import MEDIA_SUFFIXES
from tokenthrift.transcription.references import ManifestError, References, read_references
from tokenthrift.transcription.report import Bar, Tally, print_summary, results_table
from tokenthrift.transcription.results import Transcription
from tokenthrift.transcription.writers import WRITERS, printable, write_atomically

if TYPE_CHECKING:
    from tokenthrift.transcription.job import Transcriber

__all__ = ["main"]
_MANIFEST = "manifest.jsonl"

_DESCRIPTION = """\
Writes down what is said in recordings: files, whole folders or quoted patterns,
of any common sound or video format and any length. Silence gives empty text.

With --out-dir every recording gets its files there, in the folders it came from;
files that exist are left as they are, and a recording that has all of its files
is skipped, unless --overwrite is given. Without --out-dir, or with --references,
the transcripts are printed as a table."""

_EPILOG = """\
examples:
  tokenthrift transcribe talk.mp3 --model model_cards/dllm-asr-tiny-en
  tokenthrift transcribe calls/ --model owner/name --out-dir out --format txt srt
  tokenthrift transcribe 'calls/**/*.wav' --model owner/name --out-dir out

exit status:
  0    every recording was transcribed or skipped
  1    some could not be read, transcribed or written and are named on stderr;
       the others were
  2    wrong usage: an unknown option, a path that leads to nothing, a model that
       cannot be used
  130  interrupted; what was written until then is complete"""


@dataclass(frozen=True, slots=True)
class _Task:
    """A recording, and the files to write for it by format."""

    path: Path
    files: dict[str, Path]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments after `transcribe`; those of the process if None.

    Returns:
        The exit status.
    """
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    try:
        tasks, skipped, left_out = _tasks(arguments, console)
        references = _references(arguments, tasks)
        transcriber = _transcriber(arguments, console) if tasks else None
    except (ValueError, OSError, ImportError) as error:
        return _wrong(console, error)
    except KeyboardInterrupt:
        return _interrupted(console)
    tally = Tally(skipped=skipped, left_out=left_out)
    # All paths share their first folders; what tells them apart is worth the width of the table.
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(task.path)) for task in tasks]) if tasks else ""
    table, add_row = results_table(folder, references is not None)
    status = 0
    try:
        if transcriber is not None:
            for result, errors in _results(transcriber, tasks, references, tally, console):
                if arguments.out_dir is None or references is not None:
                    add_row(result, errors)
    except BudgetError as error:
        return _wrong(console, error)
    except KeyboardInterrupt:
        status = _interrupted(console)
    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 120
    if table.row_count:
        out.print(table, "")
    print_summary(out, tally, references, arguments.out_dir)
    return status or (1 if tally.failed else 0)


def _results(
    transcriber: Transcriber, tasks: Sequence[_Task], references: References | None, tally: Tally, console: Console
) -> Iterator[tuple[Transcription, ErrorCount | None]]:
    """Transcribes, writes, counts and scores; yields every result with its word errors."""
    with Bar(len(tasks), console) as bar:
        results = transcriber.stream([task.path for task in tasks], bar.advance)
        for task, result in zip(tasks, results, strict=True):
            with _uninterrupted():
                result = _write(result, task.files)
                tally.add(result)
            for note in result.notes:
                _complain(console, "note", f"{result.path}: {note}")
            if result.error is not None:
                _complain(console, "failed", f"{result.path}: {result.error}")
            yield result, references.score(result) if references is not None else None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until a file that was written is counted, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if held:
        raise KeyboardInterrupt


def _write(result: Transcription, files: dict[str, Path]) -> Transcription:
    """Writes a result's files, or none for a failed one; a result that cannot be written has failed."""
    if result.error is not None:
        return result
    for form, path in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, WRITERS[form](result))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            return replace(result, error=f"{path} cannot be written: {reason}")
    return result


def _tasks(arguments: argparse.Namespace, console: Console) -> tuple[list[_Task], int, int]:
    """What there is to do, and how many recordings have all their files already, or were left out."""
    recordings = find_files(arguments.input, MEDIA_SUFFIXES, "recording", any_suffix=arguments.any_suffix)
    if remark := recordings.remark("name them or use --any-suffix"):
        _complain(console, "note", remark)
    if arguments.out_dir is None:
        if arguments.format:
            raise ValueError("--format says which files to write, so it needs --out-dir")
        return [_Task(recording.path, {}) for recording in recordings], 0, len(recordings.left_out)
    try:
        arguments.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out-dir {arguments.out_dir}: {error.strerror}") from error
    inputs = {os.path.realpath(recording.path) for recording in recordings}
    tasks = []
    for recording in recordings:
        base = arguments.out_dir / recording.output
        files = {form: base.with_name(f"{base.name}.{form}") for form in arguments.format or ["txt"]}
        for path in files.values():
            if os.path.realpath(path) in inputs:
                raise InputError(f"{path} is one of the recordings and would be overwritten; give another --out-dir")
        if not arguments.overwrite:
            files = {form: path for form, path in files.items() if not os.path.lexists(path)}
        if files:
            tasks.append(_Task(recording.path, files))
    return tasks, len(recordings) - len(tasks), len(recordings.left_out)


def _references(arguments: argparse.Namespace, tasks: Sequence[_Task]) -> References | None:
    if arguments.references is None:
        return None
    if arguments.references:
        return read_references(Path(arguments.references))
    beside = sorted({task.path.parent / _MANIFEST for task in tasks})
    found = [manifest for manifest in beside if manifest.is_file()]
    if tasks and not found:
        raise ManifestError(f"--references: there is no {_MANIFEST} beside the recordings; name the file")
    return read_references(*found)


def _transcriber(arguments: argparse.Namespace, console: Console) -> Transcriber:
    decode = DecodeBudget(
        max_new_tokens=arguments.max_new_tokens,
        max_rounds=arguments.max_rounds,
        confidence_threshold=arguments.confidence_threshold,
    )
    budget = TokenBudget.parse(arguments.budget)
    with console.status(f"loading {escape(printable(arguments.model))}"):
        import torch

        from tokenthrift.transcription.job import Transcriber
        from tokenthrift.transcription.models import load_recognizer

        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        model = load_recognizer(arguments.model, working_device(arguments.device), arguments.revision)
        return Transcriber(
            model,
            budget=budget,
            decode=decode,
            coarse_to_fine=arguments.coarse_to_fine,
            noise_aware=arguments.noise_aware,
            batch_seconds=arguments.batch_seconds,
            track=arguments.track,
            channels=arguments.channels,
        )


def _wrong(console: Console, error: Exception) -> int:
    _complain(console, "error", str(error))
    return 2


def _interrupted(console: Console) -> int:
    console.print("interrupted", style="bold red")
    return 130


def _complain(console: Console, kind: str, message: str) -> None:
    # A log wants a line per complaint, however long; a person wants words kept whole.
    console.print(Text.assemble((f"{kind}: ", "bold red"), printable(message)), soft_wrap=not console.is_terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenthrift transcribe",
        usage="%(prog)s INPUT... --model MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="a recording, a folder, or a pattern in quotes")
    add_model_option(parser)
    add_any_suffix(parser)
    parser.add_argument("--out-dir", type=Path, metavar="DIR", help="where the files go; made if it does not exist")
    parser.add_argument(
        "--format", nargs="+", choices=list(WRITERS), metavar="FORMAT", help="any of txt json srt vtt (default: txt)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write files anew that exist")
    parser.add_argument(
        "--references",
        nargs="?",
        const="",
        metavar="FILE",
        help='score against what was said, lines of {"audio_filepath": "a.wav", "text": "..."} with paths relative '
        f"to FILE (without FILE: {_MANIFEST} beside the recordings)",
    )
    sound = parser.add_argument_group("sound")
    sound.add_argument(
        "--track",
        type=_track,
        metavar="N|LANG|all",
        help="of files with several sound tracks: a number from 1, a language such as eng, or all, each by itself "
        "(default: the one that a player takes)",
    )
    sound.add_argument(
        "--channels",
        choices=["mix", "left", "right", "each"],
        default="mix",
        help="mix them, take one, or transcribe each by itself, as for calls (default: %(default)s)",
    )
    decoding = parser.add_argument_group("decoding, for each window of at most 30 s")
    decoding.add_argument(
        "--max-rounds", type=count, metavar="N", help="most denoising rounds (default: the model's own)"
    )
    decoding.add_argument(
        "--max-new-tokens", type=count, metavar="N", help="most tokens to write (default: the model's own)"
    )
    decoding.add_argument(
        "--confidence-threshold",
        type=number(0, 1),
        metavar="P",
        help="probability from which a token is kept; lower is faster and less exact (default: the model's own)",
    )
    tokens = parser.add_argument_group("tokens, for models with several rates, each window of at most 30 s")
    tokens.add_argument("--budget", metavar="B", help="most tokens: 64, 25%%, 12.5/s (default: the model's own rates)")
    tokens.add_argument(
        "--coarse-to-fine", action="store_true", help="use finer rates only where the text has a low confidence"
    )
    tokens.add_argument("--noise-aware", action="store_true", help="choose audio and video rates by the noise")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-seconds",
        type=number(0),
        default=120.0,
        metavar="S",
        help="seconds of audio the model sees at once; less needs less memory (default: %(default)g)",
    )
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    machine.add_argument("--threads", type=count, metavar="N", help="processor threads (default: PyTorch's choice)")
    return parser


def _track(text: str) -> int | str:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    if not text.replace("-", "").isalpha():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1, a language such as eng, or all")
    return text.lower()
