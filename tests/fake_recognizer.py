"""A recognizer of pitches: it writes the same words for the same audio, and checks whatever it is given."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeBudget, DecodeLike, ItemSize, SizeLike, TokenUsage
from tokenthrift.registry import SYSTEMS, System
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.transcription import sound
from tokenthrift.transcription.engine import JobSpec

# Its voices are tones, which Silero VAD does not take for speech: windows are found by energy here.
sound.load_vad = lambda: None  # type: ignore[attr-defined, assignment]
SYSTEMS["fake"] = System(name="fake", model="tests.fake_recognizer:FakeRecognizer")


class FakeRecognizer:
    """Writes `pitch NNN` once for every started second, a token per half second, in `max_rounds` or two rounds."""

    support = BudgetSupport(fields=frozenset())
    sample_rate = 16_000
    max_seconds = 30.0

    def __init__(self, max_seconds: float = 30.0, largest_batch: int = 10_000, delay: float = 0.0) -> None:
        """Sets how long windows may be, from which batch on it runs out of memory, and how long a batch takes."""
        self.max_seconds, self.largest_batch, self.delay = max_seconds, largest_batch, delay
        self.batches: list[list[float]] = []
        self.limits: list[DecodeBudget] = []

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str = "cpu", revision: str | None = None) -> Self:
        """Reads the delay from the environment: a test that kills the process needs the time to do it."""
        assert json.loads((Path(source) / "config.json").read_text())["system"] == "fake"
        torch.device(device)
        return cls(delay=float(os.environ.get("FAKE_DELAY", "0")))

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """Two tokens for each started second."""
        seconds = [item.require("seconds") for item in items if isinstance(item, ItemSize)]
        return self.support.plan([2 * -(-round(self.sample_rate * s) // self.sample_rate) for s in seconds], budget)

    def transcribe(
        self,
        audio: Sequence[Tensor],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        decode: DecodeLike = None,
    ) -> list[Transcript]:
        """Reads every item alone."""
        assert audio, "an empty batch"
        for samples in audio:
            assert samples.ndim == 1
            assert samples.dtype == torch.float32
            assert samples.is_contiguous()
            assert 0 < len(samples) <= self.max_seconds * self.sample_rate
            assert bool(torch.isfinite(samples).all())
        self.batches.append([len(samples) / self.sample_rate for samples in audio])
        limits = DecodeBudget.parse(decode)
        self.limits.append(limits)
        if len(audio) > self.largest_batch:
            raise RuntimeError("out of memory")
        if "FAKE_DIES" in os.environ and not os.path.exists(os.environ["FAKE_DIES"]):
            Path(os.environ["FAKE_DIES"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay)
        return [self._read(samples, limits) for samples in audio]

    def _read(self, samples: Tensor, limits: DecodeBudget) -> Transcript:
        seconds = len(samples) / self.sample_rate
        spectrum = torch.fft.rfft(samples, n=2**17).abs()
        pitch = round(float(spectrum.argmax()) * self.sample_rate / 2**17 / 10) * 10
        if pitch == 660:
            raise RuntimeError("cannot read this pitch")
        words = ["pitch", str(pitch)] * -(-len(samples) // self.sample_rate)
        tokens = tuple(
            TranscriptToken(f" {word}", 0.5 + 0.5 / (index + 1), index / 2, min((index + 1) / 2, seconds))
            for index, word in enumerate(words)
            if index / 2 < seconds
        )
        rounds = 2 if limits.max_rounds is None else limits.max_rounds
        usage = TokenUsage(native=len(words) * 2, cap=len(words) * 2, used=len(tokens), rounds=rounds)
        return Transcript("".join(token.text for token in tokens).strip(), tokens, usage)


class FakeSpec(JobSpec):
    """A job whose workers know this recognizer: unpickling it imports this file."""

    __slots__ = ()


def save(folder: Path) -> Path:
    """Makes a model folder that the command can load."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"system": "fake"}')
    return folder
