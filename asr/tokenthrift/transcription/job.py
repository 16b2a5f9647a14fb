"""The batch job: recordings in, transcripts out, in the order given; for sound in bounded memory, not so for lips.

A recording is decoded once to find its windows and, if it is longer than a minute, a second time to cut them; so a
damaged file is found before any of it is transcribed. Windows of several recordings wait in a pool, which is sorted by
length and cut into batches of a stated number of padded seconds, as FunASR does; a text never depends on its
neighbors, which the recognizer guarantees. `finished` gives every recording the moment it is done, `run` in the order
of the inputs. Where a batch fails (out of memory, say) it is halved, down to the window
that fails alone and takes only its own recording with it. WhisperX and NeMo lose the whole run to one bad file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokenthrift.budget import BudgetError, BudgetLike, DecodeBudget, DecodeLike, TokenBudget
from tokenthrift.doubt import drop_doubtful
from tokenthrift.media.audio import AudioError
from tokenthrift.media.audio_track import AudioTrack
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript
from tokenthrift.transcription.joining import join_overlaps
from tokenthrift.transcription.lips import Streams, lips_in, lips_windows, streams_of
from tokenthrift.transcription.reading import Reader
from tokenthrift.transcription.recordings import Recording
from tokenthrift.transcription.results import FileTranscript, to_segment, total_usage
from tokenthrift.transcription.sound import ChannelChoice, Source, TrackChoice, missing_sound, plan_sound
from tokenthrift.transcription.windows import Samples, Window

if TYPE_CHECKING:
    from torch import Tensor

    from tokenthrift.transcription.alignment import Aligner

__all__ = ["BATCH_SECONDS", "Input", "ProgressCallback", "Transcriber", "transcribe"]

BATCH_SECONDS: Final = 120.0
ProgressCallback: TypeAlias = Callable[[float, float], None]
Input: TypeAlias = "str | Path | Recording | tuple[Any, int]"
"""A file, a part of one, or samples (numpy or torch; (n,), (channels, n) or (n, channels)) with their rate."""

_MAX_WINDOW_SECONDS: Final = 30.0
# Batches of like length need a choice of windows; memory is 64 kB for a second of it, and 230 kB more with lips.
_POOL_BATCHES: Final = 4


@dataclass(slots=True)
class _Draft:
    """A recording on its way through the job."""

    index: int
    recording: Recording
    seconds: float = 0.0
    share_left: float = 1.0
    windows: list[tuple[Window, Source | None]] | None = None
    track: AudioTrack | None = None
    notes: list[str] = field(default_factory=list)
    transcripts: dict[int, Transcript] = field(default_factory=dict)
    error: str | None = None
    error_type: str | None = None
    spent: float = 0.0
    windows_read: int = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.recording.path

    def fail(self, error: BaseException, message: str) -> None:
        """Notes why there is no transcript."""
        self.error, self.error_type = message, type(error).__name__

    @property
    def finished(self) -> bool:
        return self.error is not None or (self.windows is not None and len(self.transcripts) == len(self.windows))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A window waiting for its batch."""

    draft: _Draft
    index: int
    share: float
    length: int
    streams: Streams
    speech: NDArray[np.bool_]


class Transcriber:
    """Transcribes recordings of any length with a recognizer of short ones.

    Example:
        >>> transcriber = Transcriber(DllmAsr.from_pretrained("model_cards/dllm-asr-tiny-en"))
        >>> for result in transcriber.run(["interview.mp3", "lecture.mp4", (samples, 48_000)]):
        ...     print(result.text, result.words, result.usage.used, result.status)
    """

    def __init__(
        self,
        model: Recognizer | AudioVisualRecognizer,
        *,
        budget: BudgetLike = None,
        decode: DecodeLike = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
        batch_seconds: float = BATCH_SECONDS,
        track: TrackChoice = None,
        channels: ChannelChoice = "mix",
        drop_below: float = 0.0,
        aligner: Aligner | None = None,
    ) -> None:
        """Sets up the job.

        Args:
            model: Any recognizer.
            budget: Ceilings in tokens for what the language model reads of every window.
            decode: Limits of decoding for every window; None means the recognizer's own.
            coarse_to_fine: Use finer rates only for windows whose text has a low confidence at the coarsest rates.
            noise_aware: Choose rates by the noise of every window.
            batch_seconds: Most seconds of audio in a batch, padding counted; a longer window goes alone.
            track: Of a file with several sound tracks: a number from 1, a language ("eng"), or "all", each by itself;
                None for the default one, or where that is silent the first that is not, which a note says.
            channels: "mix" averages them without letting them cancel each other, "left" and "right" take one, "each"
                transcribes every channel by itself.
            drop_below: Words of less confidence are left out; what a recognizer repeats in a circle always is.
            aligner: Gives words their times where the model gives none.

        Raises:
            BudgetError: The recognizer does not honor a field of `budget`, or one of the two is no budget.
            ValueError: `batch_seconds` is not above 0, `drop_below` is no probability, or the recognizer has no rates
                to choose from.
        """
        if not 0 <= drop_below <= 1:
            raise ValueError(f"drop_below is a probability from 0 to 1, not {drop_below}")
        if not batch_seconds > 0:
            raise ValueError(f"batch_seconds must be above 0, not {batch_seconds}")
        limits = TokenBudget.parse(budget)
        model.support.check(limits)
        if (coarse_to_fine or noise_aware) and not isinstance(model, AudioVisualRecognizer):
            raise ValueError("coarse_to_fine and noise_aware choose rates, and this model has one rate")
        self.model, self.budget, self.decode, self.batch_seconds = (
            model,
            limits,
            DecodeBudget.parse(decode),
            batch_seconds,
        )
        self.coarse_to_fine, self.noise_aware = coarse_to_fine, noise_aware
        self.track, self.channels, self.aligner, self.drop_below = track, channels, aligner, drop_below
        rates = {"coarse_to_fine": coarse_to_fine, "noise_aware": noise_aware} if coarse_to_fine or noise_aware else {}
        self._reader = Reader(model, self.budget, self.decode, aligner, rates)

    def transcribe(self, *inputs: Input) -> list[FileTranscript]:
        """Transcribes and returns all results, one per input in the order given. Never raises for a bad file."""
        return list(self.run(inputs))

    def stream(self, paths: Iterable[Input], on_progress: ProgressCallback | None = None) -> Iterator[FileTranscript]:
        """The same as `run`."""
        return self.run(paths, on_progress)

    def run(
        self, inputs: Iterable[Input] | Input, on_progress: ProgressCallback | None = None
    ) -> Iterator[FileTranscript]:
        """Transcribes recordings one after another.

        Memory does not grow with their number. Nor does it with their length, except where the model reads lips: those
        of the file at hand are held whole, 14 MB for a minute (see `lips`).

        Args:
            inputs: Files, parts of files or samples with their rate, in the order in which results are wanted; or one.
            on_progress: Called with increments: the share of a file that was done, whose sum is the number of files
                done, and its seconds of audio.

        Yields:
            A result per input, in order, each as soon as it and all before it are done.

        Raises:
            BudgetError: The recognizer does not honor the budget.
        """
        waiting: dict[int, FileTranscript] = {}
        following = 0
        for index, result in self.finished(inputs, on_progress):
            waiting[index] = result
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def finished(
        self,
        inputs: Iterable[Input] | Input,
        on_progress: ProgressCallback | None = None,
        stop: Callable[[], bool] = bool,
    ) -> Iterator[tuple[int, FileTranscript]]:
        """As `run`, but each result comes the moment it is done, with the index of its input.

        Args:
            inputs: As in `run`.
            on_progress: As in `run`.
            stop: Asked between batches; where it says so, what is done is given out and the rest is left.
        """
        report = on_progress or (lambda share, seconds: None)
        drafts: dict[int, _Draft] = {}
        pool: list[_Piece] = []

        def take() -> Iterator[tuple[int, FileTranscript]]:
            for index in [index for index, draft in drafts.items() if draft.finished]:
                yield index, _finish(drafts.pop(index), report, self)

        for index, item in enumerate(_several(inputs)):
            if stop():
                break
            draft = drafts[index] = _Draft(index, _recording(item, index))
            for piece in self._pieces(draft):
                pool.append(piece)
                if sum(p.length for p in pool) >= _POOL_BATCHES * self.batch_seconds * self.model.sample_rate:
                    yield from self._run_pool(pool, report, stop, take)
                    if stop():
                        break
            yield from take()
        yield from self._run_pool(pool, report, stop, take)
        yield from take()

    def _pieces(self, draft: _Draft) -> Iterator[_Piece]:
        """Windows of a recording that hold sound, or all of one to be lip-read. An error is kept in the draft."""
        rate = self.model.sample_rate
        longest = min(_MAX_WINDOW_SECONDS, self.model.max_seconds)
        if draft.recording.error is not None:
            draft.error, draft.error_type = draft.recording.error, "ManifestError"
            return
        try:
            whole = draft.recording.samples is None and not draft.recording.offset and not draft.recording.duration
            lips = lips_in(self.model, draft.path) if whole else None
            silent = self._lip_windows(lips, longest)
            try:
                plans = plan_sound(draft.recording, rate, longest, self.track, self.channels)
            except AudioError:
                if not silent:
                    raise
                plans = []
            draft.seconds = max([plan.total for plan in plans] + [window.stop for window in silent[-1:]]) / rate
            draft.notes = missing_sound(draft.recording, draft.seconds)
            draft.track = plans[0].source.track if plans and self.track != "all" else None
            draft.notes += [note for plan in plans for note in plan.notes]
            draft.windows = [(window, plan.source) for plan in plans for window in plan.windows]
            speech = [plan.speech_in(window, rate) for plan in plans for window in plan.windows]
            sounds: Iterable[Samples | None] = chain.from_iterable(plan.cut(draft.path, rate) for plan in plans)
            if not draft.windows and silent:
                draft.windows, sounds = [(window, None) for window in silent], [None] * len(silent)
                speech = [np.zeros(0, dtype=bool)] * len(silent)
            count = len(draft.windows)
            for index, ((window, _), audio, spoken) in enumerate(zip(draft.windows, sounds, speech, strict=True)):
                streams = streams_of(self.model, audio, lips, window, self.budget)
                yield _Piece(draft, index, 1 / count, window.stop - window.start, streams, spoken)
        except AudioError as error:
            draft.fail(error, error.reason)
        except BudgetError as error:
            draft.fail(error, str(error))
        except Exception as error:  # Whatever else a decoder may raise concerns this file alone.
            draft.fail(error, f"{type(error).__name__}: {error}")

    def _lip_windows(self, lips: Tensor | None, longest: float) -> list[Window]:
        """Windows over the lips of a file, for a model that can do without sound."""
        model = self.model
        if lips is None or not isinstance(model, AudioVisualRecognizer) or not model.accepts(audio=False, video=True):
            return []
        return lips_windows(len(lips), model.frame_rate, model.sample_rate, longest)

    def _run_pool(
        self,
        pool: list[_Piece],
        report: ProgressCallback,
        stop: Callable[[], bool],
        take: Callable[[], Iterator[tuple[int, FileTranscript]]],
    ) -> Iterator[tuple[int, FileTranscript]]:
        """Transcribes all that waits, longest batches first so that memory runs out early if it does."""
        pool.sort(key=lambda piece: piece.length, reverse=True)
        limit = self.batch_seconds * self.model.sample_rate
        while pool and not stop():
            size = max(1, min(len(pool), int(limit // pool[0].length)))
            self._run_batch(pool[:size], report)
            del pool[:size]
            yield from take()

    def _run_batch(self, batch: list[_Piece], report: ProgressCallback) -> None:
        batch = [piece for piece in batch if piece.draft.error is None]
        if not batch:
            return
        began = time.perf_counter()
        found = self._reader.read([piece.streams for piece in batch], [piece.speech for piece in batch])
        spent = (time.perf_counter() - began) / max(1, sum(piece.length for piece in batch))
        for piece, result in zip(batch, found, strict=True):
            draft = piece.draft
            draft.spent += spent * piece.length
            if isinstance(result, Exception):
                draft.fail(result, f"transcription failed: {type(result).__name__}: {result}")
                continue
            draft.transcripts[piece.index] = result.transcript
            draft.windows_read += result.windows
            draft.share_left -= piece.share
            report(piece.share, piece.share * draft.seconds)


def transcribe(
    source: Input, model: str | Path | Recognizer | AudioVisualRecognizer | None = None, **options: Any
) -> FileTranscript:
    """Transcribes one recording in one line: `transcribe("a.wav").text`.

    Args:
        source: A file, or samples with their rate.
        model: A recognizer, a folder or `owner/name`; if None, the model folder that the environment variable
            TOKENTHRIFT_MODEL names, else the one in a checkout of this project.
        options: Those of `Transcriber`.

    Raises:
        ValueError: No model is given or found.
    """
    if model is None:
        home = Path(__file__).parents[3] / "model_cards" / "dllm-asr-tiny-en"
        model = os.environ.get("TOKENTHRIFT_MODEL") or (home if home.is_dir() else None)
        if model is None:
            raise ValueError('name a model: transcribe(..., model="owner/name"), or set TOKENTHRIFT_MODEL')
    if isinstance(model, str | Path):
        from tokenthrift.transcription.models import load_recognizer

        model = load_recognizer(model)
    return Transcriber(model, **options).transcribe(source)[0]


def _several(inputs: Iterable[Input] | Input) -> Iterable[Input]:
    """A single input is a list of one; the letters of its name, or its samples and their rate, are no inputs."""
    if isinstance(inputs, str | Path | Recording):
        return [inputs]
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[1], int | float | np.number):
        return [(inputs[0], int(inputs[1]))]
    return inputs


def _recording(item: Input, index: int) -> Recording:
    if isinstance(item, Recording):
        return item
    if isinstance(item, tuple):
        samples, rate = item
        return Recording(Path(f"audio-{index + 1}"), samples=_array(samples), rate=int(rate))
    if not isinstance(item, str | os.PathLike):
        raise TypeError(f"input {index} is a {type(item).__name__}; samples come with their rate: (samples, 16000)")
    return Recording(Path(item))


def _array(samples: Any) -> Any:
    """What numpy makes of samples; it knows no tensors of an accelerator, and none of bfloat16."""
    if not hasattr(samples, "detach"):
        return np.asarray(samples)
    samples = samples.detach().cpu()
    return (samples.float() if samples.is_floating_point() else samples).numpy()


def _finish(draft: _Draft, report: ProgressCallback, job: Transcriber) -> FileTranscript:
    rate, below = job.model.sample_rate, job.drop_below
    report(draft.share_left, draft.share_left * draft.seconds)
    common: Mapping[str, Any] = {
        "reference": draft.recording.reference,
        "offset": draft.recording.offset,
        "budget": job.budget,
        "decode": job.decode,
        "seconds_spent": draft.spent,
    }
    if draft.error is not None:
        return FileTranscript(
            draft.path, draft.seconds, (), total_usage(()), 0, draft.error, error_type=draft.error_type, **common
        )
    segments = []
    for _, windows in groupby(enumerate(draft.windows or ()), key=lambda entry: id(entry[1][1])):
        group = [(index, window.start / rate, window.stop / rate, source) for index, (window, source) in windows]
        sure = [drop_doubtful(draft.transcripts[index], end - start, below) for index, start, end, _ in group]
        for joined in join_overlaps(sure, [(start, end) for _, start, end, _ in group]):
            segments.append(to_segment(*joined, group[0][3]))
    return FileTranscript(
        draft.path,
        draft.seconds,
        tuple(sorted((segment for segment in segments if segment.text), key=lambda segment: segment.start)),
        total_usage(segment.usage for segment in segments),
        draft.windows_read,
        track=draft.track,
        notes=tuple(draft.notes),
        **common,
    )
