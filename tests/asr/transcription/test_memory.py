"""Memory grows neither with the number of recordings nor with their length."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tests.crashing import forked
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice, write
from tokenthrift.transcription import Transcriber


def peak_growth(few: list[Path], many: list[Path]) -> int:
    """MB by which the largest resident set of a fresh process grows from the first job to the second."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    def work() -> int:
        job = Transcriber(FakeRecognizer(), batch_seconds=10.0)
        for result in job.run(few):
            assert result.error is None
        before = peak()
        for result in job.run(many):
            assert result.error is None
        return min(250, (peak() - before) // 1024)

    return forked(work)


def test_the_number_of_recordings(tmp_path: Path) -> None:
    one = write(tmp_path / "a.wav", voice(4.0))
    for index in range(400):
        os.link(one, tmp_path / f"{index}.wav")
    files = sorted(tmp_path.glob("*.wav"))
    grown = peak_growth(files[:20], files)
    assert 0 <= grown < 30, f"{grown} MB more for 380 recordings, whose samples are 97 MB"


def test_the_length_of_a_recording(tmp_path: Path) -> None:
    """A minute of every ten is speech, as on the line of a hotline."""
    rate, speech = 8_000, voice(60.0, rate=8_000)
    ten = np.concatenate([speech, np.zeros(9 * 60 * rate, np.float32)])
    short = write(tmp_path / "short.wav", np.concatenate([speech, speech]), rate)
    long = write(tmp_path / "long.wav", np.concatenate([ten] * 3), rate)
    grown = peak_growth([short], [long])
    assert 0 <= grown < 40, f"{grown} MB more for half an hour, whose samples are 115 MB"
