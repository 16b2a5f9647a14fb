"""Manifests, shards of states, batches by frames, and what is kept for development."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.asr.talking import write_states, write_video
from tests.asr.tiny_mtsk import speech
from tokenthrift.mtsk.training.augmentation import Augmentation
from tokenthrift.mtsk.training.clips import CachedStates, ManifestClips, collate, open_passes
from tokenthrift.mtsk.training.data import MtskDataModule, held_out

TEXTS = ["the lazy dog", "a fox", "five six seven", "there is", "no", "one two", "lay red now", "set blue again"]
few = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips: both streams, longer sound, audio alone, video alone."""
    folder = tmp_path_factory.mktemp("clips")
    crops = np.random.default_rng(0).integers(0, 256, (30, 96, 96), dtype=np.uint8)
    for name, seconds in (("a", 1.2), ("b", 2.0), ("c", 0.8)):
        soundfile.write(folder / f"{name}.flac", speech(seconds, 1).numpy(), 16_000)
        write_video(folder / f"{name}.mkv", crops)
    names = [("a", "a"), ("b", "b"), ("c", None), (None, "a")]
    with (folder / "manifest.jsonl").open("w") as out:
        for (sound, picture), text, seconds in zip(names, TEXTS, (1.2, 2.0, 0.8, 1.2), strict=False):
            row: dict[str, Any] = {"text": text, "duration": seconds}
            row |= {"audio_filepath": f"{sound}.flac"} if sound else {}
            row |= {"video_filepath": f"{picture}.mkv"} if picture else {}
            out.write(json.dumps(row) + "\n")
    return folder / "manifest.jsonl"


def test_clips_of_a_manifest(manifest: Path) -> None:
    data = ManifestClips(manifest)
    assert data.frames == [30, 50, 20, 30]
    both, longer, audio_only, video_only = (data[i] for i in range(4))
    assert (both.audio is not None, both.video is not None) == (True, True)
    assert longer.audio is not None
    assert longer.video is not None
    # Streams of different length stay so: the model reads each by its own length.
    assert (len(longer.audio), len(longer.video)) == (32_000, 30)
    assert audio_only.video is None
    assert video_only.audio is None
    assert video_only.video is not None
    assert video_only.video.shape == (30, 96, 96)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "duration": 1.0}, "audio_filepath or video_filepath"),
        ({"audio_filepath": "a.flac", "duration": 1.0}, "text and a duration"),
        ({"audio_filepath": "a.flac", "text": "a"}, "text and a duration"),
    ],
)
def test_a_line_that_is_not_a_clip_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"audio_filepath": "a.flac", "text": "a", "duration": 1.0}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"m\.jsonl, line 2: .*{message}"):
        ManifestClips(tmp_path / "m.jsonl")


def test_augmentation_follows_epoch_and_item(manifest: Path) -> None:
    noise = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    data = ManifestClips(manifest, Augmentation([noise], snrs=[0.0]), crop=88, seed=3)
    one, two, other = data[2, 0], data[2, 0], data[3, 0]
    plain = ManifestClips(manifest)[0]
    assert one.audio is not None
    assert two.audio is not None
    assert other.audio is not None
    assert plain.audio is not None
    assert one.video is not None
    assert torch.equal(one.audio, two.audio)
    assert not torch.equal(one.audio, other.audio)
    assert not torch.equal(one.audio, plain.audio)
    assert one.video.shape == (30, 88, 88)


def test_a_stream_missing_in_one_item_is_missing_in_the_batch(manifest: Path) -> None:
    data = ManifestClips(manifest)
    both = collate([data[0], data[1]])
    assert isinstance(both.audio, list)
    assert isinstance(both.video, list)
    assert [len(row) for row in both.audio] == [19_200, 32_000]
    assert collate([data[0], data[2]]).video is None
    assert collate([data[0], data[3]]).audio is None


def test_states_come_back_as_they_were_written(tmp_path: Path) -> None:
    paths = [write_states(tmp_path / f"{i}.safetensors", TEXTS[4 * i : 4 * i + 4]) for i in range(2)]
    data = CachedStates(paths)
    assert data.texts == TEXTS
    assert data.frames == [3 * len(text) for text in TEXTS]
    clip = data[5]
    assert clip.audio is not None
    assert clip.video is not None
    assert (clip.text, clip.audio.shape, clip.video.shape) == ("one two", (42, 32), (21, 64))
    batch = collate([data[1], data[5]])
    assert isinstance(batch.audio, torch.Tensor)
    assert batch.audio.shape == (2, 42, 32)
    assert batch.audio_lengths is not None
    assert batch.audio_lengths.tolist() == [30, 42]
    torch.testing.assert_close(batch.audio[1], clip.audio.float())
    assert not batch.audio[0, 30:].any()


def test_passes_are_of_the_same_recordings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train.*speech_states\.py"):
        open_passes(tmp_path)
    for name in ("train/00-000", "train/01-000", "dev/00-000"):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        write_states(path, TEXTS[:2])
    train, clean, dev = open_passes(tmp_path)
    assert (train.texts, clean.texts, dev.texts) == (TEXTS[:2] * 2, TEXTS[:2], TEXTS[:2])
    write_states(tmp_path / "train/01-001.safetensors", TEXTS[2:3])
    with pytest.raises(ValueError, match="different recordings"):
        open_passes(tmp_path)


@few
@given(st.lists(st.text("abc ", max_size=4), max_size=100), st.floats(0, 1))
def test_development_texts_are_no_training_texts(texts: list[str], share: float) -> None:
    train, dev = held_out(texts, share)
    assert sorted(train + dev) == list(range(len(texts)))
    assert {texts[i] for i in train}.isdisjoint(texts[i] for i in dev)


def test_a_data_module_over_states(tmp_path: Path) -> None:
    many = [f"{text} {n}" for n in ("", "a", "b", "c", "d", "e", "f", "g", "h", "i") for text in TEXTS]
    write_states(tmp_path / "train" / "0.safetensors", many)
    write_states(tmp_path / "dev" / "0.safetensors", TEXTS)
    data = MtskDataModule(str(tmp_path / "train"), max_frames=200)
    data.setup("fit")
    read = [text for batch in data.train_dataloader() for text in batch.texts]
    kept = [text for batch in data.val_dataloader() for text in batch.texts]
    assert sorted(read + kept) == sorted(many)
    assert {*read}.isdisjoint(kept)
    named = MtskDataModule(str(tmp_path / "train"), str(tmp_path / "dev"), dev_items=3)
    named.setup("fit")
    assert len(named.train) == len(many)
    assert {text for batch in named.val_dataloader() for text in batch.texts} <= {*TEXTS}
    assert len(named.dev) == 3


def test_an_empty_folder_says_what_makes_the_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"states\.py"):
        MtskDataModule(str(tmp_path)).setup("fit")


def test_a_data_module_goes_on_where_it_was(tmp_path: Path) -> None:
    write_states(tmp_path / "0.safetensors", [f"{text} {n}" for n in "abc" for text in TEXTS])
    whole = MtskDataModule(str(tmp_path), str(tmp_path), max_frames=100)
    whole.setup("fit")
    epochs = [[batch.texts for batch in whole.train_dataloader()]]
    whole.sampler.start(1, 0)
    epochs.append([batch.texts for batch in whole.train_dataloader()])
    for state, expected in (({"epoch": 0, "step": 4}, epochs[0][4:]), ({"consumed": 4}, epochs[0][4:])):
        resumed = MtskDataModule(str(tmp_path), str(tmp_path), max_frames=100)
        resumed.setup("fit")
        resumed.load_state_dict(state)
        assert [batch.texts for batch in resumed.train_dataloader()] == expected
    assert sorted(text for texts in epochs[0] for text in texts) == sorted(whole.train.texts)


def test_batches_keep_to_the_frames_with_their_padding(tmp_path: Path) -> None:
    write_states(tmp_path / "0.safetensors", [f"{text} {n}" for n in ("", "a", "bcd") for text in TEXTS])
    data = MtskDataModule(str(tmp_path), str(tmp_path), max_frames=150)
    data.setup("fit")
    frames = dict(zip(data.train.texts, data.train.frames, strict=True))
    batches = [[frames[text] for text in batch.texts] for batch in data.train_dataloader()]
    assert all(max(batch) * len(batch) <= 150 or len(batch) == 1 for batch in batches)
    assert max(map(len, batches)) > 2


def test_a_clip_that_cannot_be_read_is_named_and_left_out(manifest: Path, tmp_path: Path) -> None:
    shutil.copytree(manifest.parent, tmp_path / "clips")
    copied = tmp_path / "clips" / manifest.name
    (tmp_path / "clips" / "b.flac").write_bytes(b"no sound")
    data = MtskDataModule(str(copied), str(copied), max_frames=1)
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"left out: .*b\.flac.* \(1 of 4 items so far\)"):
        batches = list(data.train_dataloader())
    read = [text for batch in batches for text in batch.texts]
    assert (len(batches), sorted(read)) == (4, sorted([TEXTS[0], *TEXTS[2:4]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(bool(batch.texts) for batch in data.train_dataloader()) == 3, "named once"


def test_clips_of_which_none_can_be_read_are_an_error(manifest: Path, tmp_path: Path) -> None:
    shutil.copy(manifest, tmp_path)
    data = MtskDataModule(str(tmp_path / manifest.name), str(tmp_path / manifest.name), max_frames=30)
    data.setup("fit")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="none of 4 items can be read"):
        list(data.train_dataloader())
