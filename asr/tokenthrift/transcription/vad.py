"""Where somebody speaks: Silero VAD, by the weights of its package, over a stream.

The PyPI package `silero-vad` (MIT) holds the weights as safetensors (of another training than its files for ONNX and
TorchScript). Only that file is read: importing the package sets the number of threads of the whole process to one, and
its own decoders want another torchaudio. The network is that of the package's `tinygrad_model.py` (short-time Fourier
transform, four convolutions, an LSTM, a sigmoid). It is small enough for numpy, so that a job whose recognizer does
without PyTorch does not wait for its import; all but the recurrence of the LSTM runs over many frames at once.

Each four seconds are brought to one loudness first, because the network does not detect a quiet voice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tokenthrift.transcription.vad_weights import find_weights
from tokenthrift.transcription.windows import Samples

__all__ = ["CHUNK", "SAMPLE_RATE", "SileroVad", "SpeechDetector", "load_vad", "speech_frames"]

State: TypeAlias = tuple[Samples, Samples]
"""What the LSTM remembers: two vectors of 128."""

SAMPLE_RATE: Final = 16_000
CHUNK: Final = 512
"""Samples of a frame that gets one probability."""

_CONTEXT: Final = 64
_BINS: Final = 129
_UNITS: Final = 128
_BLOCK: Final = 125 * CHUNK
_PEAK: Final = 0.5
_MOST_GAIN: Final = 300.0
_START: Final = 0.5
_GOES_ON: Final = 0.25
_LEAST_CHUNKS: Final = 3


class SileroVad:
    """Probability of speech for every 32 ms.

    Args:
        weights: arrays by the names of the package's file.
    """

    def __init__(self, weights: dict[str, NDArray[np.float32]]) -> None:
        self._fourier = np.ascontiguousarray(weights["stft_conv.weight"][:, 0].T)
        # (taps, in, out), so that a convolution is one product for each tap.
        self._convolutions = [
            (np.ascontiguousarray(weights[f"conv{i}.weight"].transpose(2, 1, 0)), weights[f"conv{i}.bias"], stride)
            for i, stride in ((1, 1), (2, 2), (3, 2), (4, 1))
        ]
        self._input = np.ascontiguousarray(weights["lstm_cell.weight_ih"].T)
        self._recurrent = weights["lstm_cell.weight_hh"]
        self._bias = weights["lstm_cell.bias_ih"] + weights["lstm_cell.bias_hh"]
        self._final, self._final_bias = weights["final_conv.weight"][0, :, 0], weights["final_conv.bias"]

    def __call__(self, frames: Samples, state: State | None) -> tuple[Samples, State]:
        """Probabilities of frames that follow each other.

        Args:
            frames: (T, 576): 64 samples of what comes before, and 512 samples.
            state: What the call before returned; None at the start.

        Returns:
            (T,) probabilities in [0, 1], and the state behind them.
        """
        padded = np.pad(frames, ((0, 0), (0, 64)), mode="reflect")
        spectrum = sliding_window_view(padded, 256, axis=1)[:, ::128] @ self._fourier
        hidden = np.sqrt(np.square(spectrum[..., :_BINS]) + np.square(spectrum[..., _BINS:]))
        for taps, bias, stride in self._convolutions:
            whole = np.pad(hidden, ((0, 0), (1, 1), (0, 0)))
            last = whole.shape[1] - 2
            hidden = np.maximum(sum(whole[:, i : last + i : stride] @ tap for i, tap in enumerate(taps)) + bias, 0)
        gates = hidden[:, 0] @ self._input + self._bias
        short, long = state or (np.zeros(_UNITS, np.float32), np.zeros(_UNITS, np.float32))
        outputs = np.empty((len(frames), _UNITS), np.float32)
        for step, gate in enumerate(gates):
            gate = gate + self._recurrent @ short
            cell = np.tanh(gate[2 * _UNITS : 3 * _UNITS])
            take, keep, _, give = _sigmoid(gate).reshape(4, _UNITS)
            long = keep * long + take * cell
            outputs[step] = short = give * np.tanh(long)
        return _sigmoid(np.maximum(outputs, 0) @ self._final + self._final_bias), (short, long)


def _sigmoid(x: Samples) -> Samples:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * x), dtype=np.float32)


@lru_cache(maxsize=1)
def load_vad() -> SileroVad | None:
    """The network, or None without its weights."""
    weights = find_weights()
    return None if weights is None else SileroVad(load_file(weights))


class SpeechDetector:
    """Listens to a stream of 16 kHz that passes through; afterwards `probabilities` has one for every 512 samples."""

    def __init__(self, model: SileroVad) -> None:
        self._model = model
        self._state: State | None = None
        self._context = np.zeros(_CONTEXT, np.float32)
        self._found: list[Samples] = []

    @property
    def probabilities(self) -> Samples:
        """(frames,) in [0, 1]; a last frame may be shorter."""
        return np.concatenate([np.zeros(0, np.float32), *self._found])

    def through(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        """Passes (samples,) blocks on."""
        rest = np.zeros(0, np.float32)
        for block in blocks:
            rest = np.concatenate([rest, block])
            while len(rest) >= _BLOCK:
                self._detect(rest[:_BLOCK])
                rest = rest[_BLOCK:]
            yield block
        if len(rest):
            self._detect(np.pad(rest, (0, -len(rest) % CHUNK)))

    def _detect(self, samples: Samples) -> None:
        samples = samples - samples.mean(dtype=np.float32)
        loud = samples * np.float32(_PEAK / max(float(np.abs(samples).max()), _PEAK / _MOST_GAIN))
        whole = np.concatenate([self._context, loud])
        found, self._state = self._model(sliding_window_view(whole, _CONTEXT + CHUNK)[::CHUNK], self._state)
        self._context = whole[-_CONTEXT:]
        self._found.append(found)


def speech_frames(probabilities: Samples, count: int, size: int) -> NDArray[np.bool_]:
    """Which of `count` frames of `size` samples hold speech.

    Speech starts where it is likelier than not, reaches as far as it is not unlikely, and lasts a tenth of a second.
    """
    runs = np.flatnonzero(np.diff(np.r_[False, probabilities > _GOES_ON, False].astype(np.int8)))
    speech = np.zeros(len(probabilities), dtype=bool)
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        speech[start:stop] = (probabilities[start:stop] > _START).sum() >= _LEAST_CHUNKS
    middles = (np.arange(count) * size + size // 2) // CHUNK
    return np.asarray(speech[np.minimum(middles, len(speech) - 1)]) if len(speech) else np.zeros(count, dtype=bool)
