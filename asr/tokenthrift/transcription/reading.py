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
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript
from tokenthrift.transcription.doubt import drop_doubtful
from tokenthrift.transcription.lips import Streams
from tokenthrift.transcription.rereading import Part, left_out, to_reread, with_reread

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
        found: list[WindowTranscript | Exception] = [
            result if isinstance(result, Exception) else WindowTranscript(result) for result in self._halving(batch)
        ]
        if self.budget != TokenBudget() or self.decode.max_new_tokens is not None:
            return found  # Such a limit is one of the window, and may be why words are missing.
        sounds = {i: item.audio for i, item in enumerate(batch) if item.audio is not None and item.video is None}
        for index, audio in sounds.items():
            result = found[index]
            if not isinstance(result, Exception):
                # A phrase that repeats without end covers speech that has no words then.
                plain = drop_doubtful(result.transcript, len(audio) / self.model.sample_rate)
                found[index] = WindowTranscript(plain)
        alone = getattr(self.model, "reads_sentences_alone", False)
        self._reread(sounds, speech, found, to_reread if alone else left_out)
        self._reread(sounds, speech, found, partial(left_out, behind_word=True))
        return found

    def _reread(
        self,
        sounds: Mapping[int, Samples],
        speech: Sequence[NDArray[np.bool_]],
        found: list[WindowTranscript | Exception],
        parts_of: Callable[[Transcript, NDArray[np.bool_]], list[Part]],
    ) -> None:
        """Reads parts of windows again, and puts what is better into `found`."""
        parts: list[tuple[int, Part, Streams]] = []
        for index, audio in sounds.items():
            result = found[index]
            if not isinstance(result, Exception):
                # From the last to the first: replacing a part then changes no index of the parts before it.
                for part in reversed(parts_of(result.transcript, speech[index])):
                    parts.append((index, part, Streams(self._cut(audio, part), None)))
        again = self._halving([item for *_, item in parts]) if parts else []
        for (index, part, _), reread in zip(parts, again, strict=True):
            whole = found[index]
            if isinstance(reread, Exception):
                found[index] = reread
            elif not isinstance(whole, Exception):
                # A phrase that repeats has many words, which must not replace fewer true ones.
                reread = drop_doubtful(reread, part.end - part.start)
                found[index] = WindowTranscript(with_reread(whole.transcript, part, reread), whole.windows + 1)

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
