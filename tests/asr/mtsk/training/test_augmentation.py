"""Noise, rooms and masks: levels are what they say, and nothing is drawn but from the generator given."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.tiny_mtsk import lips, speech
from tokenthrift.mtsk.audiovisual.lips import MEAN_GRAY
from tokenthrift.mtsk.audiovisual.noise import active, mix, snr_of
from tokenthrift.mtsk.training.augmentation import TRAINING_SNRS, Augmentation, mask_audio, mask_video

NOISE = Path(__file__).resolve().parents[5] / "shared" / "data" / "noise"


def noise(samples: int, seed: int = 9) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([-5.0, 0.0, 5.0, 10.0, 20.0]), st.floats(1e-3, 10.0), st.integers(100, 40_000))
def test_a_level_is_what_it_says(snr: float, loudness: float, length: int) -> None:
    clean = torch.cat([torch.zeros(8_000), speech(1.0, 1), torch.zeros(8_000)])
    mixed = mix(clean, loudness * noise(length), snr)
    assert snr_of(clean, mixed - clean) == pytest.approx(snr, abs=0.02)


def test_zero_decibels_is_as_loud_as_the_speech() -> None:
    clean = torch.cat([speech(1.0, 1), torch.zeros(16_000)])
    added = mix(clean, noise(32_000), 0.0) - clean
    where = active(clean)
    assert added[where].square().mean() == pytest.approx(clean[where].square().mean().item(), rel=1e-3)
    # Pauses do not count: over the whole recording the same noise is louder than the speech.
    assert added.square().mean() > 1.5 * clean.square().mean()
    assert 0.0 in TRAINING_SNRS
    drawn = Augmentation([noise(8_000)], snrs=[0.0], room_share=0.0).noisy(clean, random.Random(1))
    assert snr_of(clean, drawn - clean) == pytest.approx(0.0, abs=0.02)


def test_pauses_are_not_speech() -> None:
    where = active(torch.cat([torch.zeros(3_200), noise(3_200), 1e-3 * noise(3_200)]))
    assert where.tolist() == [False] * 3_200 + [True] * 3_200 + [False] * 3_200
    assert active(torch.zeros(700)).all()


def test_silence_stays_silence() -> None:
    quiet = torch.zeros(1_000)
    assert torch.equal(mix(quiet, noise(50), 0.0), quiet)
    clean = speech(0.2, 0)
    assert torch.equal(mix(clean, torch.zeros(50), 0.0), clean)


@pytest.mark.parametrize(("seconds", "most"), [(0.3, 1), (2.0, 2), (2.1, 3)])
def test_masks_take_one_stretch_of_every_started_second(seconds: float, most: int) -> None:
    samples = torch.ones(int(seconds * 16_000))
    lost = [int((mask_audio(samples, random.Random(i)) == 0).sum()) for i in range(200)]
    assert max(lost) <= most * 6_400
    assert max(lost) > most * 2_000
    frames = torch.full((round(seconds * 25), 4, 4), 7, dtype=torch.uint8)
    masked = [mask_video(frames, random.Random(i)) for i in range(200)]
    counts = [int((m == MEAN_GRAY).all((1, 2)).sum()) for m in masked]
    assert max(counts) <= min(most * 10, len(frames))
    assert max(counts) > most * 4 - 1
    assert (frames == 7).all(), "the clip itself is left as it is"


def test_what_is_drawn_depends_on_the_generator_alone() -> None:
    augmentation = Augmentation([noise(9_000), noise(30_000, 3)], [noise(200, 4)], room_share=0.5)
    clean, frames = speech(1.0, 0), lips(1.0, 0, 96)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = augmentation.audio(clean, random.Random(7)), augmentation.video(frames, random.Random(7))
    assert torch.equal(torch.random.get_rng_state(), state)
    two = augmentation.audio(clean, random.Random(7)), augmentation.video(frames, random.Random(7))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], augmentation.audio(clean, random.Random(8)))
    assert one[1].shape == (25, 88, 88)


def test_a_room_does_not_move_the_sound() -> None:
    room = torch.zeros(4_000)
    room[500], room[900] = 1.0, 0.3  # the direct sound comes after the recording of the room began
    click = torch.zeros(8_000)
    click[2_000] = 1.0
    heard = Augmentation([], [room], room_share=1.0).noisy(click, random.Random(0))
    assert len(heard) == len(click)
    assert int(heard.abs().argmax()) == 2_000


def test_folders_of_noise_and_rooms(tmp_path: Path) -> None:
    for name in ("noise1.flac", "babble.wav", "rir1.flac"):
        soundfile.write(tmp_path / name, noise(1_600).clamp(-1, 1).numpy() * 0.5, 8_000)
    found = Augmentation.from_folders([tmp_path])
    assert [len(found.noises), len(found.rooms)] == [2, 1]
    assert len(found.noises[0]) == 3_200
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no sound files"):
        Augmentation.from_folders([tmp_path / "empty"])


def test_recorded_noise_and_rooms() -> None:
    if not NOISE.is_dir():
        pytest.skip(f"no recorded noise at {NOISE}")
    found = Augmentation.from_folders([NOISE], snrs=[0.0])
    assert (len(found.noises), len(found.rooms)) == (5, 4)
    speech = noise(16_000) * torch.linspace(0, 9, 16_000).sin().abs()
    for seed in range(8):
        dry, wet = (replace(found, room_share=share).noisy(speech, random.Random(seed)) for share in (0.0, 1.0))
        assert dry.isfinite().all()
        assert snr_of(speech, dry - speech) == pytest.approx(0.0, abs=0.1)
        assert wet.shape == speech.shape
        assert wet.isfinite().all()
        assert not torch.equal(wet, dry)
