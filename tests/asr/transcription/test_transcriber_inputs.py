"""What `Transcriber` and `transcribe` take: samples in memory, one input or many, and the names they are called by."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import fake_recognizer
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice, write
from tokenthrift.media.audio import AudioError
from tokenthrift.transcription import FileTranscript, Recording, Transcriber, transcribe


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_samples_in_memory(rate: int, tmp_path: Path) -> None:
    """Arrays and tensors, one channel or several, floats or integers, give what the file gives."""
    samples = voice(2.0, rate=rate)
    wanted = Transcriber(FakeRecognizer()).transcribe(write(tmp_path / "a.wav", samples, rate))[0]
    stereo = np.stack([samples, samples])
    bytes_ = np.round(samples * 127 + 128).astype(np.uint8)
    inputs = [samples, torch.from_numpy(samples), stereo, stereo.T, (samples * 32767).astype(np.int16), bytes_]
    for result in Transcriber(FakeRecognizer()).run([(item, rate) for item in inputs]):
        assert isinstance(result, FileTranscript)
        assert result.text == wanted.text == "pitch 140 pitch 140"
        assert abs(result.seconds - 2.0) < 0.01
        assert [word.text for word in result.words] == result.text.split()
    for layout in (stereo, np.ascontiguousarray(stereo.T)):
        each = Transcriber(FakeRecognizer(), channels="each").transcribe((layout, rate))[0]
        assert {segment.channel for segment in each.segments} == {"left", "right"}


def test_odd_samples_fail_alone() -> None:
    good = voice(1.0)
    odd = [np.full(99, np.nan), np.zeros((2, 2, 2)), np.zeros(0), np.zeros((300, 300)), good > 0, np.array(["a"])]
    rates = [(good, 0), (good, 10**12), (good, 16_000)]
    for channels in ("mix", "each"):
        job = Transcriber(FakeRecognizer(), channels=channels)
        results = list(job.run([*((item, 16_000) for item in odd), *rates]))
        assert [result.status for result in results] == ["failed"] * 8 + ["completed"]
        assert {result.error_type for result in results[:8]} == {AudioError.__name__}
    with pytest.raises(TypeError, match="come with their rate"):
        Transcriber(FakeRecognizer()).transcribe(good)


def test_a_single_input_is_a_list_of_one(tmp_path: Path) -> None:
    """And not the letters of its name, or its samples and their rate."""
    path, samples = write(tmp_path / "a.wav", voice(1.0)), voice(1.0)
    singles: list[Any] = [str(path), path, Recording(path), (samples, 16_000), (samples, np.int64(16_000))]
    for single in singles:
        (result,) = Transcriber(FakeRecognizer()).run(single)
        assert result.text == "pitch 140"


def test_the_public_names_are_those_of_the_package(tmp_path: Path) -> None:
    public: Any = importlib.import_module("tokenthrift.transcription")
    assert {"FileTranscript", "Transcriber", "Word", "transcribe"} <= {*public.__all__}
    result = public.transcribe(write(tmp_path / "a.wav", voice(1.0)), FakeRecognizer())
    assert isinstance(result, public.FileTranscript)
    assert result.words
    assert all(isinstance(word, public.Word) for word in result.words)


def test_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", voice(1.0))
    assert transcribe(str(path), FakeRecognizer()).text == "pitch 140"
    assert transcribe(path, fake_recognizer.save(tmp_path / "model")).text == "pitch 140"
    monkeypatch.setenv("TOKENTHRIFT_MODEL", str(tmp_path / "model"))
    assert transcribe(path).text == "pitch 140"
