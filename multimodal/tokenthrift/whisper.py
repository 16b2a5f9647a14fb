"""Whisper's encoder over the audio that is there, instead of always 30 seconds.

Source: Radford et al. 2022 (arXiv 2212.04356), section 2.2; weights and key names as in transformers' `WhisperEncoder`.
What differs: mel frames and positions are cropped to the audio (12 to 19 times less work on short clips), several
recordings of unequal length share a batch behind a key mask, and the sinusoidal positions are computed, not stored. A
row of a batch equals the row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.padding import length_mask, pad_rows
from tokenthrift.whisper_frames import (
    FOURIER_POINTS,
    HOP,
    MAX_STATES,
    SAMPLE_RATE,
    STATE_SAMPLES,
    mel_filters,
    states_of,
)

__all__ = [
    "HOP",
    "MAX_STATES",
    "SAMPLE_RATE",
    "STATE_SAMPLES",
    "Attention",
    "EncoderLayer",
    "WhisperEncoder",
    "encode_recordings",
    "encoder_weights",
    "log_mel",
    "pad_mels",
    "sinusoids",
    "states_of",
]


@cache
def _mel_filters(bins: int) -> Tensor:
    with torch.inference_mode(False):  # kept, so a later call may be one of training
        return torch.from_numpy(mel_filters(bins))


def log_mel(samples: Tensor, bins: int = 80) -> Tensor:
    """Whisper's log-mel spectrogram of one recording.

    Args:
        samples: `(n,)` mono at 16 kHz in [-1, 1]; filled with silence up to a whole encoder state.
        bins: mel bins of the checkpoint, 80 or 128.

    Returns:
        `(bins, frames)` float32 whatever the default dtype and under autocast too, with `frames = 2 * states_of(n)`.
    """
    if samples.ndim != 1:
        raise ValueError(f"audio must be one channel of shape (samples,), got {tuple(samples.shape)}")
    samples = F.pad(samples.float(), (0, STATE_SAMPLES * states_of(len(samples)) - len(samples)))
    window = torch.hann_window(FOURIER_POINTS, dtype=torch.float32, device=samples.device)
    with torch.autocast(samples.device.type, enabled=False):
        power = torch.stft(samples, FOURIER_POINTS, HOP, window=window, return_complex=True)[:, :-1].abs().square()
        logs = (_mel_filters(bins).to(samples.device) @ power).clamp_min(1e-10).log10()
    return (torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0


def pad_mels(mels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Recordings of unequal length as one batch `(B, bins, frames)`, zero at the ends, and their states `(B,)`."""
    frames = max(m.shape[1] for m in mels)
    batch = torch.stack([F.pad(m, (0, frames - m.shape[1])) for m in mels])
    return batch, torch.tensor([m.shape[1] // 2 for m in mels], device=batch.device)


def sinusoids(length: int, width: int) -> Tensor:
    """Whisper's fixed encoder positions, `(length, width)` float32."""
    # Whole numbers times a float are of the default dtype, and bf16 does not know 1,499 from 1,500.
    scale = torch.exp(-math.log(10_000) / (width // 2 - 1) * torch.arange(width // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * scale[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Multi-head attention with the key names of transformers' Whisper; keys carry no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `memory` `(B, N, width)`, each `(B, heads, N, width / heads)`."""
        return self._split(self.k_proj(memory)), self._split(self.v_proj(memory))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """`x` `(B, L, width)` looks at given keys and values; `mask` is true where looking is allowed."""
        y = F.scaled_dot_product_attention(self._split(self.q_proj(x)), *keys_values, attn_mask=mask)
        projected: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.self_attn_layer_norm(x)
        x = x + self.self_attn(h, self.self_attn.keys_values(h), mask)
        y: Tensor = self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x + y


class WhisperEncoder(nn.Module):
    """Mel frames to one state each 20 ms.

    Args:
        width: model width (384 for tiny).
        layers: encoder layers.
        heads: attention heads.
        ffn: width of the feed-forward.
        bins: mel bins.
    """

    def __init__(self, width: int, layers: int, heads: int, ffn: int, bins: int = 80) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)
        self.positions: Tensor
        self.register_buffer("positions", sinusoids(MAX_STATES, width), persistent=False)

    def forward(self, mels: Tensor, lengths: Tensor) -> Tensor:
        """Encode a padded batch.

        Args:
            mels: `(B, bins, 2 * N)`; what stands after the end of a recording is not read.
            lengths: `(B,)` states of each recording, at most 1,500.

        Returns:
            `(B, N, width)` states, zero after the end of each recording.
        """
        if mels.shape[2] > 2 * MAX_STATES:
            seconds = mels.shape[2] * HOP / SAMPLE_RATE
            raise ValueError(f"one pass takes at most {MAX_STATES // 50} s of audio, got {seconds:.1f} s; cut it up")
        mels = mels.masked_fill(~length_mask(2 * lengths, mels.shape[2])[:, None], 0.0)
        x = F.gelu(self.conv2(F.gelu(self.conv1(mels)))).transpose(1, 2)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        valid = length_mask(lengths, x.shape[1])
        mask = None if bool(valid.all()) else valid[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        states: Tensor = self.layer_norm(x)
        return states * valid[..., None]


def encode_recordings(
    encoder: WhisperEncoder,
    audio: Sequence[Tensor],
    bins: int = 80,
    trailing_silence: float = 0.0,
    *,
    together: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode recordings, in the precision and on the device of the encoder.

    Args:
        encoder: Whisper's.
        audio: `(samples,)` each, mono at 16 kHz in [-1, 1], at most 30 s; one or more.
        bins: mel bins of the checkpoint.
        trailing_silence: seconds of silence that the encoder reads after a recording, up to 30 s in all. Whisper was
            trained on 30 s always and makes errors where the audio ends with the last word. Its states are not kept.
        together: as one padded batch; None for one at a time on a processor, which would compute padding too.

    Returns:
        `(B, N, width)` states, one for every started 20 ms and zero after the end of each recording, and their lengths
        `(B,)`.
    """
    weight = encoder.conv1.weight
    silence, most = round(trailing_silence * SAMPLE_RATE), MAX_STATES * STATE_SAMPLES
    padded = [F.pad(row.to(weight.device), (0, max(0, min(silence, most - len(row))))) for row in audio]
    mels = [log_mel(samples, bins).to(weight.dtype) for samples in padded]
    lengths = torch.tensor([states_of(len(samples)) for samples in audio], device=weight.device)
    together = weight.device.type != "cpu" if together is None else together
    groups = [mels] if together else [[mel] for mel in mels]
    rows = [row for group in groups for row in encoder(*pad_mels(group))]
    states = pad_rows(rows)[0][:, : int(lengths.max())]
    return states.masked_fill(~length_mask(lengths, states.shape[1])[..., None], 0.0), lengths


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our encoder's tensors from a transformers Whisper state dict (`model.encoder.*`), without the fixed positions."""
    prefix = "model.encoder." if any(k.startswith("model.encoder.") for k in state) else "encoder."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and "embed_positions" not in k}
