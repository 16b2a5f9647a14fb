"""Silero VAD: no words where nobody speaks, whatever the recognizer invents; and all of the speech of real voices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.asr.one_token import RATE, USAGE, OneToken
from tests.media_files import Samples, write
from tokenthrift.budget import BudgetLike, DecodeLike
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.transcription import Transcriber, sound
from tokenthrift.transcription.vad import CHUNK, SpeechDetector, load_vad, speech_frames
from tokenthrift.transcription.vad_weights import find_weights
from tokenthrift.transcription.windows import frame_levels, plan_windows

pytest.importorskip("silero_vad")

SECONDS = 6
TIME = np.arange(SECONDS * RATE) / RATE
VOICES = sorted((Path(__file__).parents[3] / "samples" / "speech").glob("*.flac"))


class Inventor(OneToken):
    """Writes the same sure words for whatever it gets."""

    def transcribe(
        self, audio: Sequence[Tensor], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        tokens = (TranscriptToken(" thanks", 1.0, 0.0, 0.1), TranscriptToken(" for", 1.0, 0.1, 0.2))
        return [Transcript("thanks for", tokens, USAGE) for _ in audio]


@pytest.fixture(autouse=True)
def silero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have put energy in its place."""
    monkeypatch.setattr(sound, "load_vad", load_vad)


def _pink(count: int) -> Samples:
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=count))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, count)
    return np.asarray(noise / np.abs(noise).max(), dtype=np.float32)


def _keypad() -> Samples:
    samples = np.zeros(len(TIME))
    tones = [(697, 1209), (770, 1336), (852, 1477), (941, 1336), (941, 1477), (697, 1477)]
    for index, pair in enumerate(tones * 3):
        press = 0.4 * sum(np.sin(2 * np.pi * hertz * np.arange(2400) / RATE) for hertz in pair)
        samples[4800 * (index + 1) : 4800 * (index + 1) + 2400] = press
    return np.asarray(samples, dtype=np.float32)


def _chords() -> Samples:
    time, parts = np.arange(RATE) / RATE, []
    for root in [220.0, 261.6, 196.0, 174.6, 220.0, 146.8]:
        notes = (np.sin(2 * np.pi * root * r * k * time) / k for r in (1, 1.26, 1.5) for k in range(1, 6))
        parts.append(0.1 * sum(notes) * np.exp(-2 * time))
    return np.asarray(np.concatenate(parts), dtype=np.float32)


def _clicks() -> Samples:
    samples = np.zeros(len(TIME), dtype=np.float32)
    samples[::4000] = 0.9
    return samples


NOISE = np.asarray(np.random.default_rng(1).normal(size=len(TIME)), dtype=np.float32)
SPEECHLESS = {
    "silence": np.zeros(len(TIME), dtype=np.float32),
    "white noise": 0.1 * NOISE,
    "faint white noise": 3e-4 * NOISE,
    "pink noise": 0.5 * _pink(len(TIME)),
    "rising noise": _pink(len(TIME)) * np.linspace(0.01, 0.8, len(TIME)),
    "hum": 0.5 * np.sin(2 * np.pi * 50 * TIME) + 0.2 * np.sin(2 * np.pi * 150 * TIME),
    "dial tone": 0.3 * np.sin(2 * np.pi * 350 * TIME) + 0.3 * np.sin(2 * np.pi * 440 * TIME),
    "busy tone": 0.4 * np.sin(2 * np.pi * 425 * TIME) * (np.sin(2 * np.pi * TIME) > 0),
    "sweep": 0.5 * np.sin(2 * np.pi * (200 * TIME + 100 * TIME**2)),
    "keypad tones": _keypad(),
    "chords": _chords(),
    "clicks": _clicks(),
}


@pytest.mark.parametrize("kind", SPEECHLESS)
def test_nothing_is_written_where_nobody_speaks(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", np.asarray(SPEECHLESS[kind], dtype=np.float32))
    (result,) = Transcriber(Inventor()).transcribe(path)
    assert (result.text, result.status, result.windows, result.error) == ("", "no speech", 0, None)


def test_what_is_not_speech_is_written_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set would prove nothing if no reader heard it; energy alone takes tones that come and go for speech."""
    monkeypatch.setattr(sound, "load_vad", lambda: None)
    (result,) = Transcriber(Inventor()).transcribe(write(tmp_path / "x.wav", _keypad()))
    assert result.status == "completed"


def _blocks(samples: Samples, size: int) -> list[Samples]:
    return [samples[at : at + size] for at in range(0, len(samples), size)]


def _speech(samples: Samples) -> np.ndarray:
    model = load_vad()
    assert model is not None
    detector = SpeechDetector(model)
    list(detector.through(_blocks(samples, 50_000)))
    return speech_frames(detector.probabilities, -(-len(samples) // 320), 320)


def _joined(gap: float) -> tuple[Samples, np.ndarray]:
    """Sentences with pauses between them, and which frames are loud."""
    parts = []
    for path in VOICES[:4]:
        parts += [soundfile.read(path, dtype="float32")[0], np.zeros(round(gap * RATE), np.float32)]
    samples = np.concatenate(parts)
    frames = np.pad(samples, (0, -len(samples) % 320)).reshape(-1, 320)
    return samples, np.square(frames).mean(1) > 0.05 * np.square(samples).mean()


@pytest.mark.parametrize("gap", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("noise", ["none", "20", "10", "0", "rising"])
def test_windows_hold_the_speech_of_real_voices(gap: float, noise: str) -> None:
    samples, loud = _joined(gap)
    power = np.sqrt(np.square(samples).mean())
    if noise != "none":
        hiss = np.random.default_rng(2).normal(size=len(samples)) * power
        scale = 10 ** (-float(noise) / 20) if noise != "rising" else np.linspace(0.03, 1, len(samples))
        samples = np.asarray(samples + hiss * scale, dtype=np.float32)
    levels, total = frame_levels([samples], RATE)
    windows = plan_windows(levels, total, RATE, 30.0, _speech(samples))
    held = np.zeros(len(levels), dtype=bool)
    for window in windows:
        held[window.start // 320 : -(-window.stop // 320)] = True
    assert held[loud].mean() > (0.9 if noise in ("0", "rising") else 0.99)
    if gap == 3.0 and noise == "none":
        assert len(windows) == 4
        assert held.mean() < 0.75


def test_a_quiet_voice_is_heard_and_blocks_do_not_matter() -> None:
    samples, loud = _joined(0.5)
    quiet = np.asarray(np.round(samples * 1e-3 * 32768) / 32768, dtype=np.float32)
    assert _speech(quiet)[loud].mean() > 0.9
    model = load_vad()
    assert model is not None
    found = []
    for sizes in (len(samples), 1000, 77_777):
        detector = SpeechDetector(model)
        passed = np.concatenate(list(detector.through(_blocks(samples, sizes))))
        assert np.array_equal(passed, samples)
        found.append(detector.probabilities)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_neither_the_package_nor_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from tokenthrift.transcription.vad import load_vad\n"
        "assert load_vad() is not None and not {'silero_vad', 'torch'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_probabilities_are_those_of_the_published_network() -> None:
    """Step by step in PyTorch, as the package's `tinygrad_model.py` describes it."""
    weights = load_file(find_weights() or "")
    samples = torch.from_numpy(soundfile.read(VOICES[0], dtype="float32")[0][: 60 * CHUNK])
    cell = torch.nn.LSTMCell(128, 128)
    cell.load_state_dict({name: weights[f"lstm_cell.{name}"] for name in cell.state_dict()})
    state: tuple[Tensor, Tensor] | None = None
    expected: list[float] = []
    for frame in F.pad(samples, (64, 0)).unfold(0, 576, CHUNK):
        padded = F.pad(frame[None, None], (0, 64), mode="reflect")
        real, imaginary = F.conv1d(padded, weights["stft_conv.weight"], stride=128).split(129, dim=1)
        hidden = (real**2 + imaginary**2).sqrt()
        for i, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):
            kernel, bias = weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]
            hidden = F.conv1d(hidden, kernel, bias, stride, padding=1).relu()
        state = cell(hidden[..., 0], state)
        last = F.conv1d(state[0].relu()[..., None], weights["final_conv.weight"], weights["final_conv.bias"])
        expected.append(last.sigmoid().item())
    model = load_vad()
    assert model is not None
    windows = sliding_window_view(np.pad(samples.numpy(), (64, 0)), 576)[::CHUNK]
    assert max(expected) > 0.9
    assert np.abs(model(windows, None)[0] - expected).max() < 1e-5
