"""Recordings and mouth crops to padded encoder states, and states that were made elsewhere.

Source: Llama-MTSK (arXiv 2503.06362), section 3. Differs from the published code, unless the configuration asks for it:
Whisper reads the waveform at its own level over the audio that is there, and each item has states by its own length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, normalize
from tokenthrift.mtsk.audiovisual.released import released_lengths, released_mels
from tokenthrift.mtsk.config import AudioConfig, VideoConfig
from tokenthrift.padding import pad_rows
from tokenthrift.whisper import WhisperEncoder, encode_recordings, pad_mels

__all__ = ["audio_states_of", "padded_states", "video_states_of"]


def audio_states_of(
    encoder: WhisperEncoder, config: AudioConfig, audio: Sequence[Tensor], *, released: bool
) -> tuple[Tensor, Tensor]:
    """Whisper states (B, N, D) of recordings (samples,), and their lengths (B,)."""
    weight, bins = encoder.conv1.weight, config.num_mel_bins
    if not released:
        return encode_recordings(encoder, audio, bins, config.trailing_silence)
    samples = [row.to(weight.device) for row in audio]
    mels, whole = pad_mels(released_mels(samples, bins))
    lengths = released_lengths([len(row) for row in samples], weight.device)
    return encoder(mels.to(weight.dtype), whole)[:, : int(lengths[0])], lengths


def video_states_of(
    encoder: AvHubert, config: VideoConfig, video: Sequence[Tensor], *, released: bool
) -> tuple[Tensor, Tensor]:
    """AV-HuBERT states (B, T, D) of mouth crops (T, H, W), and their lengths (B,)."""
    weight = encoder.post_extract_proj.weight
    frames = [normalize(row.to(weight.device), config.crop, config.shrink).to(weight.dtype) for row in video]
    padded, mask = pad_rows(frames)
    lengths = torch.full_like(mask[:, 0], padded.shape[1], dtype=torch.int64) if released else mask.sum(1)
    return encoder(padded, lengths), lengths


def padded_states(rows: Sequence[Tensor], size: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """States (T, size) that were made elsewhere as one batch (B, T, size), and their lengths (B,).

    Args:
        rows: of each item.
        size: width that the model reads.
        weight: gives device and precision.

    Raises:
        ValueError: states of another width.
    """
    wrong = next((row for row in rows if row.ndim != 2 or row.shape[1] != size), None)
    if wrong is not None:
        raise ValueError(f"states must be (frames, {size}), got {tuple(wrong.shape)}")
    padded, mask = pad_rows([row.to(weight) for row in rows])
    return padded, mask.sum(1)
