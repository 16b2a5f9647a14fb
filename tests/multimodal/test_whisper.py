"""Whisper's spectrogram and encoder: what transformers and openai-whisper compute, over no more audio than there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers import WhisperModel as ReferenceWhisper

from tests.asr.tiny_dllm import speech
from tokenthrift.whisper import (
    MAX_STATES,
    STATE_SAMPLES,
    WhisperEncoder,
    encode_recordings,
    encoder_weights,
    log_mel,
    pad_mels,
    sinusoids,
    states_of,
)

SIZES: dict[str, int] = {"width": 32, "layers": 2, "heads": 4, "ffn": 48, "bins": 8}
TOLERANCE = 1e-4
few = settings(deadline=None, max_examples=25)


def encoder(seed: int = 0) -> WhisperEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WhisperEncoder(**SIZES).eval()


@torch.no_grad()
def encode(model: WhisperEncoder, mels: list[Tensor], padding: float = 0.0) -> list[Tensor]:
    """States of each recording, with `padding` in the mel frames after its end."""
    batch, lengths = pad_mels(mels)
    frames = torch.arange(batch.shape[2]) < 2 * lengths[:, None]
    states = model(batch.masked_fill(~frames[:, None], padding), lengths)
    assert not states[torch.arange(states.shape[1]) >= lengths[:, None]].any(), "states after the end are not zero"
    return [row[:n] for row, n in zip(states, lengths.tolist(), strict=True)]


@given(st.integers(0, 4000))
@few
def test_a_recording_has_two_frames_for_each_started_state(samples: int) -> None:
    states = states_of(samples)
    assert states >= 1
    assert (states - 1) * STATE_SAMPLES < max(1, samples) <= states * STATE_SAMPLES
    mel = log_mel(torch.linspace(-1, 1, samples), bins=8)
    assert mel.shape == (8, 2 * states)
    assert mel.isfinite().all()


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrogram_of_thirty_seconds_equals_transformers(bins: int) -> None:
    samples = speech(30.0)
    extractor: Any = WhisperFeatureExtractor(feature_size=bins)
    expected = extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_features[0]
    torch.testing.assert_close(log_mel(samples, bins), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bins", [80, 128])
def test_spectrogram_of_thirty_seconds_equals_openai_whisper(bins: int) -> None:
    audio = pytest.importorskip("whisper.audio")
    samples = speech(30.0, seed=1)
    expected = audio.log_mel_spectrogram(samples, bins)
    torch.testing.assert_close(log_mel(samples, bins), expected, rtol=0, atol=TOLERANCE)


def test_cropped_spectrogram_is_the_beginning_of_the_padded_one() -> None:
    samples = speech(1.3)
    padded = torch.nn.functional.pad(samples, (0, 30 * 16_000 - len(samples)))
    ours = log_mel(samples)
    # The last two frames see the end: silence there, its mirror here.
    torch.testing.assert_close(ours[:, :-2], log_mel(padded)[:, : ours.shape[1] - 2], rtol=0, atol=1e-5)


def test_spectrogram_is_float32_under_autocast_too() -> None:
    samples = speech(1.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_mel(samples)
    assert found.dtype == torch.float32
    assert torch.equal(found, log_mel(samples))


@pytest.mark.parametrize("silence", [0.0, 0.3])
def test_recordings_of_one_batch_are_encoded_as_one_by_one(silence: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = WhisperEncoder(32, 2, 4, 48, bins=8).eval()
    audio = [speech(seconds, seed=i) for i, seconds in enumerate((0.7, 29.9, 0.01, 1.3))]
    with torch.no_grad():
        one_by_one, lengths = encode_recordings(encoder, audio, 8, silence)
        together, same = encode_recordings(encoder, audio, 8, silence, together=True)
    assert lengths.tolist() == same.tolist() == [states_of(len(samples)) for samples in audio]
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-5)
    assert not any(row[n:].any() for row, n in zip(together, lengths.tolist(), strict=True))


def test_silence_has_a_flat_spectrogram() -> None:
    mel = log_mel(torch.zeros(1000))
    assert mel.unique().tolist() == pytest.approx([(-10 + 4) / 4])


@pytest.mark.parametrize("shape", [(2, 16_000), (1, 16_000), ()])
def test_spectrogram_wants_one_channel(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one channel"):
        log_mel(torch.zeros(shape))


def test_encoder_equals_transformers_on_thirty_seconds() -> None:
    config = WhisperConfig(
        vocab_size=50,
        d_model=32,
        num_mel_bins=8,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=4,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reference: Any = ReferenceWhisper(config).eval()
        for name, parameter in reference.encoder.named_parameters():
            if parameter.ndim > 1 and "positions" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model = encoder(seed=1)
    model.load_state_dict(encoder_weights({f"model.{k}": v for k, v in reference.state_dict().items()}))
    mel = log_mel(speech(30.0), bins=8)
    with torch.no_grad():
        expected = reference.encoder(mel[None]).last_hidden_state[0]
    (states,) = encode(model, [mel])
    assert states.shape == (MAX_STATES, 32)
    assert states.std() > 0.1
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)
    # A bare WhisperModel names its tensors without the leading "model.".
    assert set(encoder_weights(reference.state_dict())) == set(model.state_dict())


def test_positions_are_sines_then_cosines() -> None:
    table = sinusoids(10, 6)
    assert table[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert table[3, 0] == pytest.approx(torch.tensor(3.0).sin().item())
    assert table[7, 5] == pytest.approx(torch.tensor(7e-4).cos().item())


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 99))
@few
def test_a_row_of_a_batch_equals_the_row_alone(lengths: list[int], seed: int) -> None:
    model = encoder()
    generator = torch.Generator().manual_seed(seed)
    mels = [torch.randn(8, 2 * n, generator=generator) for n in lengths]
    for mel, states in zip(mels, encode(model, mels, padding=float("nan")), strict=True):
        (alone,) = encode(model, [mel])
        torch.testing.assert_close(states, alone, rtol=0, atol=1e-5)


def test_more_than_thirty_seconds_are_refused() -> None:
    mel = torch.zeros(1, 8, 2 * MAX_STATES + 2)
    with pytest.raises(ValueError, match=r"at most 30 s of audio, got 30\.0 s"):
        encoder()(mel, torch.tensor([MAX_STATES + 1]))
