"""A recogniser that hears pitches: it writes the same words for the same audio, and checks whatever it is given."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget, TokenUsage
from tokenthrift.cli import SYSTEMS
from tokenthrift.transcript import Transcript, TranscriptToken

SYSTEMS["fake"] = "tests.fake_recogniser:FakeRecogniser"


class FakeRecogniser:
    """Writes `pitch NNN` once for every started second, a token per half second, in `max_rounds` or two rounds."""

    sample_rate = 16_000
    max_seconds = 30.0

    def __init__(self, max_seconds: float = 30.0, largest_batch: int = 10_000, delay: float = 0.0) -> None:
        """Sets how long windows may be, from which batch on it runs out of memory, and how long a batch takes."""
        self.max_seconds, self.largest_batch, self.delay = max_seconds, largest_batch, delay
        self.batches: list[list[float]] = []
        self.budgets: list[DecodeBudget | None] = []

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: str = "cpu") -> Self:
        """Reads the delay from the environment: a test that kills the process needs the time to do it."""
        assert json.loads((Path(source) / "config.json").read_text())["system"] == "fake"
        torch.device(device)
        return cls(delay=float(os.environ.get("FAKE_DELAY", "0")))

    def transcribe(self, audio: Sequence[Tensor], budget: DecodeBudget | None = None) -> list[Transcript]:
        """Hears every item alone."""
        assert audio, "an empty batch"
        for samples in audio:
            assert samples.ndim == 1
            assert samples.dtype == torch.float32
            assert samples.is_contiguous()
            assert 0 < len(samples) <= self.max_seconds * self.sample_rate
            assert bool(torch.isfinite(samples).all())
        self.batches.append([len(samples) / self.sample_rate for samples in audio])
        self.budgets.append(budget)
        if len(audio) > self.largest_batch:
            raise RuntimeError("out of memory")
        time.sleep(self.delay)
        return [self._hear(samples, budget) for samples in audio]

    def _hear(self, samples: Tensor, budget: DecodeBudget | None) -> Transcript:
        seconds = len(samples) / self.sample_rate
        spectrum = torch.fft.rfft(samples, n=2**17).abs()
        pitch = round(float(spectrum.argmax()) * self.sample_rate / 2**17 / 10) * 10
        if pitch == 660:
            raise RuntimeError("cannot hear this pitch")
        words = ["pitch", str(pitch)] * -(-len(samples) // self.sample_rate)
        tokens = tuple(
            TranscriptToken(f" {word}", 0.5 + 0.5 / (index + 1), index / 2, min((index + 1) / 2, seconds))
            for index, word in enumerate(words)
            if index / 2 < seconds
        )
        rounds = 2 if budget is None or budget.max_rounds is None else budget.max_rounds
        usage = TokenUsage(native=len(words) * 2, cap=len(words) * 2, used=len(tokens), rounds=rounds)
        return Transcript("".join(token.text for token in tokens).strip(), tokens, usage)


def save(folder: Path) -> Path:
    """Makes a model folder that the command can load."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"system": "fake"}')
    return folder
