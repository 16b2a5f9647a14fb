"""Where somebody speaks: Silero VAD, by the weights of its package, over a stream.

The PyPI package `silero-vad` (MIT) holds the weights as safetensors. Only that file is read: importing the package sets
the number of threads of the whole process to one, and its own decoders want another torchaudio. The network is that of
the package's reference (short-time Fourier transform, four convolutions, an LSTM, a sigmoid); all but the LSTM runs
over many frames at once here.

Each four seconds are brought to one loudness first, because the network does not hear a quiet voice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tokenthrift.transcription.vad_weights import find_weights

__all__ = ["CHUNK", "SAMPLE_RATE", "SileroVad", "SpeechDetector", "load_vad", "speech_frames"]

SAMPLE_RATE: Final = 16_000
CHUNK: Final = 512
"""Samples of a frame that gets one probability."""

_CONTEXT: Final = 64
_BINS: Final = 129
_BLOCK: Final = 125 * CHUNK
_PEAK: Final = 0.5
_MOST_GAIN: Final = 300.0
_START: Final = 0.5
_GOES_ON: Final = 0.25
_LEAST_CHUNKS: Final = 3


class SileroVad(nn.Module):
    """Probability of speech for every 32 ms; parameters are called as in the package's file."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * _BINS, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(_BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    @torch.no_grad()
    def forward(self, frames: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Probabilities of frames that follow each other.

        Args:
            frames: (T, 576): 64 samples of what comes before, and 512 samples.
            state: What the call before returned; None at the start.

        Returns:
            (T,) probabilities in [0, 1], and the state behind them.
        """
        spectrum = self.stft_conv(F.pad(frames[:, None], (0, 64), mode="reflect"))
        hidden = (spectrum[:, :_BINS] ** 2 + spectrum[:, _BINS:] ** 2).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            hidden = layer(hidden).relu()
        cell = self.lstm_cell
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        before = state or (torch.zeros(1, cell.hidden_size), torch.zeros(1, cell.hidden_size))
        # All frames in one call, which takes two fifths of the time of one call a frame.
        outputs, hidden_state, cell_state = torch.lstm(
            hidden.transpose(1, 2), tuple(part[None] for part in before), weights, True, 1, 0.0, False, False, False
        )
        return self.final_conv(outputs[:, 0, :, None].relu()).sigmoid()[:, 0, 0], (hidden_state[0], cell_state[0])


@lru_cache(maxsize=1)
def load_vad() -> SileroVad | None:
    """The network, or None without its weights."""
    weights = find_weights()
    if weights is None:
        return None
    model = SileroVad()
    model.load_state_dict(load_file(weights))
    return model.eval().requires_grad_(False)


class SpeechDetector:
    """Listens to a stream of 16 kHz that passes through; afterwards `probabilities` has one for every 512 samples."""

    def __init__(self, model: SileroVad) -> None:
        self._model = model
        self._state: tuple[Tensor, Tensor] | None = None
        self._context = torch.zeros(_CONTEXT)
        self._found: list[Tensor] = []

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(frames,) in [0, 1]; a last frame may be shorter."""
        return torch.cat([torch.zeros(0), *self._found]).numpy()

    def through(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Passes (samples,) blocks on."""
        rest = torch.zeros(0)
        for block in blocks:
            rest = torch.cat([rest, block])
            while len(rest) >= _BLOCK:
                self._hear(rest[:_BLOCK])
                rest = rest[_BLOCK:]
            yield block
        if len(rest):
            self._hear(F.pad(rest, (0, -len(rest) % CHUNK)))

    def _hear(self, samples: Tensor) -> None:
        samples = samples - samples.mean()
        loud = samples * (_PEAK / samples.abs().max().clamp(min=_PEAK / _MOST_GAIN))
        whole = torch.cat([self._context, loud])
        found, self._state = self._model(whole.unfold(0, _CONTEXT + CHUNK, CHUNK), self._state)
        self._context = whole[-_CONTEXT:]
        self._found.append(found)


def speech_frames(probabilities: NDArray[np.float32], count: int, size: int) -> NDArray[np.bool_]:
    """Which of `count` frames of `size` samples hold speech.

    Speech starts where it is likelier than not, reaches as far as it is not unlikely, and lasts a tenth of a second.
    """
    runs = np.flatnonzero(np.diff(np.r_[False, probabilities > _GOES_ON, False].astype(np.int8)))
    speech = np.zeros(len(probabilities), dtype=bool)
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        speech[start:stop] = (probabilities[start:stop] > _START).sum() >= _LEAST_CHUNKS
    middles = (np.arange(count) * size + size // 2) // CHUNK
    return np.asarray(speech[np.minimum(middles, len(speech) - 1)]) if len(speech) else np.zeros(count, dtype=bool)
