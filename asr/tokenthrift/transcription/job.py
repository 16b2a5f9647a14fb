"""The batch job: recordings in, transcripts out, in the order given; for sound in bounded memory, not so for lips.

A recording is decoded once to find its windows and, if it is longer than a minute, a second time to cut them; so a
damaged file is found before any of it is transcribed. Windows of several recordings wait in a pool, which is sorted by
length and cut into batches of a stated number of padded seconds, as FunASR does; a text never depends on its
neighbors, which the recognizer guarantees. Where a batch fails (out of memory, say) it is halved, down to the window
that fails alone and takes only its own recording with it. WhisperX and NeMo lose the whole run to one bad file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, BudgetLike, DecodeBudget, DecodeLike, TokenBudget
from tokenthrift.media.audio import AudioError
from tokenthrift.media.audio_track import AudioTrack
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript
from tokenthrift.transcription.lips import Streams, lips_in, lips_windows, streams_of
from tokenthrift.transcription.results import Transcription, to_segment, total_usage
from tokenthrift.transcription.sound import ChannelChoice, Source, TrackChoice, plan_sound
from tokenthrift.transcription.windows import Window

__all__ = ["BATCH_SECONDS", "ProgressCallback", "Transcriber"]

BATCH_SECONDS: Final = 120.0
ProgressCallback: TypeAlias = Callable[[float, float], None]

_MAX_WINDOW_SECONDS: Final = 30.0
# Batches of like length need a choice of windows; memory is 64 kB for a second of it, and 230 kB more with lips.
_POOL_BATCHES: Final = 4


@dataclass(slots=True)
class _Draft:
    """A recording on its way through the job."""

    path: Path
    seconds: float = 0.0
    share_left: float = 1.0
    windows: list[tuple[Window, Source | None]] | None = None
    track: AudioTrack | None = None
    notes: list[str] = field(default_factory=list)
    transcripts: dict[int, Transcript] = field(default_factory=dict)
    error: str | None = None

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


class Transcriber:
    """Transcribes recordings of any length with a recognizer of short ones.

    Example:
        >>> transcriber = Transcriber(DllmAsr.from_pretrained("model_cards/dllm-asr-tiny-en"))
        >>> for result in transcriber.transcribe("interview.mp3", "lecture.mp4"):
        ...     print(result.text, result.usage.used, result.error)
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

        Raises:
            BudgetError: The recognizer does not honor a field of `budget`, or one of the two is no budget.
            ValueError: `batch_seconds` is not above 0, or the recognizer has no rates to choose from.
        """
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
        self.track, self.channels = track, channels

    def transcribe(self, *paths: str | Path) -> list[Transcription]:
        """Transcribes files and returns all results, one per path in the order given. Never raises for a bad file."""
        return list(self.stream(paths))

    def stream(
        self, paths: Iterable[str | Path], on_progress: ProgressCallback | None = None
    ) -> Iterator[Transcription]:
        """Transcribes files one after another.

        Memory does not grow with their number. Nor does it with their length, except where the model reads lips: those
        of the file at hand are held whole, 14 MB for a minute (see `lips`).

        Args:
            paths: Files, in the order in which results are wanted.
            on_progress: Called with increments: the share of a file that was done, whose sum is the number of files
                done, and its seconds of audio.

        Yields:
            A result per path, in order, each as soon as it and all before it are done.

        Raises:
            BudgetError: The recognizer does not honor the budget.
        """
        report = on_progress or (lambda share, seconds: None)
        drafts: deque[_Draft] = deque()
        pool: list[_Piece] = []
        for path in paths:
            draft = _Draft(Path(path))
            drafts.append(draft)
            for piece in self._pieces(draft):
                pool.append(piece)
                if sum(p.length for p in pool) >= _POOL_BATCHES * self.batch_seconds * self.model.sample_rate:
                    self._run_pool(pool, report)
                    yield from _take_finished(drafts, report, self.model.sample_rate)
            if not pool:
                yield from _take_finished(drafts, report, self.model.sample_rate)
        self._run_pool(pool, report)
        yield from _take_finished(drafts, report, self.model.sample_rate)

    def _pieces(self, draft: _Draft) -> Iterator[_Piece]:
        """Windows of a recording that hold sound, or all of one to be lip-read. An error is kept in the draft."""
        rate = self.model.sample_rate
        longest = min(_MAX_WINDOW_SECONDS, self.model.max_seconds)
        try:
            lips = lips_in(self.model, draft.path)
            silent = self._lip_windows(lips, longest)
            try:
                plans = plan_sound(draft.path, rate, longest, self.track, self.channels)
            except AudioError:
                if not silent:
                    raise
                plans = []
            draft.seconds = max([plan.total for plan in plans] + [window.stop for window in silent[-1:]]) / rate
            draft.track = plans[0].source.track if plans and self.track != "all" else None
            draft.notes = [note for plan in plans for note in plan.notes]
            draft.windows = [(window, plan.source) for plan in plans for window in plan.windows]
            sounds: Iterable[Tensor | None] = chain.from_iterable(plan.cut(draft.path, rate) for plan in plans)
            if not draft.windows and silent:
                draft.windows, sounds = [(window, None) for window in silent], [None] * len(silent)
            count = len(draft.windows)
            for index, ((window, _), audio) in enumerate(zip(draft.windows, sounds, strict=True)):
                streams = streams_of(self.model, audio, lips, window, self.budget)
                yield _Piece(draft, index, 1 / count, window.stop - window.start, streams)
        except AudioError as error:
            draft.error = error.reason
        except BudgetError as error:
            draft.error = str(error)
        except Exception as error:  # Whatever else a decoder may raise concerns this file alone.
            draft.error = f"{type(error).__name__}: {error}"

    def _lip_windows(self, lips: Tensor | None, longest: float) -> list[Window]:
        """Windows over the lips of a file, for a model that can do without sound."""
        model = self.model
        if lips is None or not isinstance(model, AudioVisualRecognizer) or not model.accepts(audio=False, video=True):
            return []
        return lips_windows(len(lips), model.frame_rate, model.sample_rate, longest)

    def _transcribe(self, batch: list[_Piece]) -> list[Transcript]:
        audio, video = [piece.streams.audio for piece in batch], [piece.streams.video for piece in batch]
        if isinstance(self.model, AudioVisualRecognizer):
            return self.model.transcribe(
                audio,
                video,
                self.budget,
                decode=self.decode,
                coarse_to_fine=self.coarse_to_fine,
                noise_aware=self.noise_aware,
            )
        sounds = [samples for samples in audio if samples is not None]
        return self.model.transcribe(sounds, self.budget, self.decode)

    def _run_pool(self, pool: list[_Piece], report: ProgressCallback) -> None:
        """Transcribes all that waits, longest batches first so that memory runs out early if it does."""
        pool.sort(key=lambda piece: piece.length, reverse=True)
        limit = self.batch_seconds * self.model.sample_rate
        while pool:
            size = max(1, min(len(pool), int(limit // pool[0].length)))
            self._run_batch(pool[:size], report)
            del pool[:size]

    def _run_batch(self, batch: list[_Piece], report: ProgressCallback) -> None:
        batch = [piece for piece in batch if piece.draft.error is None]
        if not batch:
            return
        try:
            transcripts = self._transcribe(batch)
            if len(transcripts) != len(batch):
                raise RuntimeError(f"the model gave {len(transcripts)} transcripts for {len(batch)} windows")
        except BudgetError:
            raise
        except Exception as error:
            if len(batch) > 1:
                # Cached blocks of the failed batch would make the halves fail as well.
                torch.cuda.empty_cache()
                self._run_batch(batch[: len(batch) // 2], report)
                self._run_batch(batch[len(batch) // 2 :], report)
            else:
                batch[0].draft.error = f"transcription failed: {type(error).__name__}: {error}"
            return
        for piece, transcript in zip(batch, transcripts, strict=True):
            draft = piece.draft
            draft.transcripts[piece.index] = transcript
            draft.share_left -= piece.share
            report(piece.share, piece.share * draft.seconds)


def _take_finished(drafts: deque[_Draft], report: ProgressCallback, rate: int) -> Iterator[Transcription]:
    while drafts and drafts[0].finished:
        yield _finish(drafts.popleft(), report, rate)


def _finish(draft: _Draft, report: ProgressCallback, rate: int) -> Transcription:
    report(draft.share_left, draft.share_left * draft.seconds)
    if draft.error is not None:
        return Transcription(draft.path, draft.seconds, (), total_usage(()), 0, draft.error)
    segments = [
        to_segment(draft.transcripts[index], window.start / rate, window.stop / rate, source)
        for index, (window, source) in enumerate(draft.windows or ())
    ]
    return Transcription(
        draft.path,
        draft.seconds,
        tuple(sorted((segment for segment in segments if segment.text), key=lambda segment: segment.start)),
        total_usage(segment.usage for segment in segments),
        len(segments),
        track=draft.track,
        notes=tuple(draft.notes),
    )
