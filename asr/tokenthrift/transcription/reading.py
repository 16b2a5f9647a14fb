"""A batch of windows to transcripts, by any recognizer; a window that fails does not stop the others.

Where a batch fails (out of memory, say) it is halved, down to the window that fails alone. Speech that was left out is
read again, and sentences in doubt are too where the recognizer gains by it (`rereading`). Words without times are
aligned. Nothing here knows of files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tokenthrift.budget import BudgetError, DecodeBudget, TokenBudget
from tokenthrift.doubt import drop_doubtful
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript
from tokenthrift.transcription.lips import Streams
from tokenthrift.transcription.rereading import Part, doubtful, frame, left_out
from tokenthrift.transcription.splicing import with_reread

if TYPE_CHECKING:
    from torch import Tensor

    from tokenthrift.transcription.alignment import Aligner
    from tokenthrift.transcription.windows import Samples

__all__ = ["Reader", "WindowTranscript"]


@dataclass(frozen=True, slots=True)
class WindowTranscript:
    """The transcript of a window, and how many windows were read for it: itself, and each part that was read again."""

    transcript: Transcript
    windows: int = 1


@dataclass(frozen=True, slots=True)
class Reader:
    """Transcribes windows.

    Attributes:
        model: any recognizer.
        budget: ceilings in tokens for every window.
        decode: limits of decoding for every window.
        aligner: gives words their times where the model gives none.
        rates: how a model with several rates chooses among them.
    """

    model: Recognizer | AudioVisualRecognizer
    budget: TokenBudget
    decode: DecodeBudget
    aligner: Aligner | None
    rates: Mapping[str, bool]

    def read(self, batch: Sequence[Streams], speech: Sequence[NDArray[np.bool_]]) -> list[WindowTranscript | Exception]:
        """Transcribes windows; each as if it were alone.

        Args:
            batch: what each window gives the model.
            speech: `(frames,)` of each, whether somebody speaks.

        Returns:
            For each window its transcript, or why there is none.

        Raises:
            BudgetError: the model does not honor the budget.
        """
        if self.budget != TokenBudget() or self.decode.max_new_tokens is not None:
            # Such a limit is one of the window, and may be why words are missing.
            return [r if isinstance(r, Exception) else WindowTranscript(r) for r in self._halving(batch)]
        found = self._plain(batch)
        sounds = {i: item.audio for i, item in enumerate(batch) if item.audio is not None and item.video is None}
        alone = getattr(self.model, "reads_sentences_alone", False)
        self._reread(sounds, speech, found, partial(left_out, in_doubt=not alone))
        if alone:
            self._reread(sounds, speech, found, doubtful)
        self._reread(sounds, speech, found, partial(left_out, behind_word=True))
        return found

    def _reread(
        self,
        sounds: Mapping[int, Samples],
        speech: Sequence[NDArray[np.bool_]],
        found: list[WindowTranscript | Exception],
        parts_of: Callable[[Transcript, NDArray[np.bool_]], list[Part]],
        *,
        again: bool = True,
    ) -> None:
        """Reads parts of windows again, and puts what is better into `found`.

        Args:
            sounds: of windows, by index.
            speech: of every window.
            found: likewise, its transcript.
            parts_of: what to read of a window.
            again: what reading a part leaves out is read once more.
        """
        parts: list[tuple[int, Part]] = []
        for index in sounds:
            result = found[index]
            if not isinstance(result, Exception):
                # From the last to the first: replacing a part then changes no index of the parts before it.
                parts += [(index, part) for part in reversed(parts_of(result.transcript, speech[index]))]
        if not parts:
            return
        cuts = {i: self._cut(sounds[index], part) for i, (index, part) in enumerate(parts)}
        reread = self._plain([Streams(audio, None) for audio in cuts.values()])
        if again:
            inside = [speech[index][frame(part.start) : frame(part.end)] for index, part in parts]
            self._reread(cuts, inside, reread, left_out, again=False)
        for (index, part), result in zip(parts, reread, strict=True):
            whole = found[index]
            if isinstance(result, Exception):
                found[index] = result
            elif not isinstance(whole, Exception):
                spliced = with_reread(whole.transcript, part, result.transcript)
                found[index] = WindowTranscript(spliced, whole.windows + result.windows)

    def _plain(self, batch: Sequence[Streams]) -> list[WindowTranscript | Exception]:
        """Transcripts without circles: such a phrase covers speech without words, and must not replace true ones."""
        found: list[WindowTranscript | Exception] = []
        for item, result in zip(batch, self._halving(batch), strict=True):
            if not isinstance(result, Exception) and item.audio is not None and item.video is None:
                result = drop_doubtful(result, len(item.audio) / self.model.sample_rate)
            found.append(result if isinstance(result, Exception) else WindowTranscript(result))
        return found

    def _cut(self, audio: Samples, part: Part) -> Samples:
        rate = self.model.sample_rate
        return np.ascontiguousarray(audio[round(part.start * rate) : round(part.end * rate)])

    def _halving(self, batch: Sequence[Streams]) -> list[Transcript | Exception]:
        try:
            transcripts = self._transcribe(batch)
            if len(transcripts) != len(batch):
                raise RuntimeError(f"the model gave {len(transcripts)} transcripts for {len(batch)} windows")
        except BudgetError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return [error]
            # Cached blocks of the failed batch would make the halves fail as well.
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            half = len(batch) // 2
            return [*self._halving(batch[:half]), *self._halving(batch[half:])]
        return [self._aligned(item, transcript) for item, transcript in zip(batch, transcripts, strict=True)]

    def _transcribe(self, batch: Sequence[Streams]) -> list[Transcript]:
        sounds: list[Any] = [item.audio for item in batch]
        if not getattr(self.model, "takes_arrays", False):
            sounds = [None if samples is None else _tensor(samples) for samples in sounds]
        if isinstance(self.model, AudioVisualRecognizer):
            lips = [item.video for item in batch]
            return self.model.transcribe(sounds, lips, self.budget, decode=self.decode, **self.rates)
        return self.model.transcribe(sounds, self.budget, self.decode)

    def _aligned(self, item: Streams, transcript: Transcript) -> Transcript | Exception:
        timed = transcript.words or all(token.start is not None for token in transcript.tokens)
        if self.aligner is None or item.audio is None or timed:
            return transcript
        try:
            words = self.aligner.align(_tensor(item.audio), self.model.sample_rate, transcript)
        except Exception as error:  # Out of memory, say; it concerns this window alone.
            return error
        return replace(transcript, words=words)


def _tensor(samples: Samples) -> Tensor:
    """The samples as most recognizers want them."""
    import torch

    return torch.from_numpy(samples)
