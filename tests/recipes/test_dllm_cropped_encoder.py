"""The encoder that is fine-tuned on cropped audio: what it learns, how it goes on, what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.asr.tiny_dllm import speech, write_whisper
from tests.recipes.dllm_scripts import RATE, run, script, write_speech

cropped, features = script("cropped_encoder"), script("features")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture
def cropping(whisper: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of the training of an encoder, its steps apart."""
    write_speech(tmp_path / "speech")
    (tmp_path / "dev").mkdir()
    soundfile.write(tmp_path / "dev" / "a.flac", speech(0.4, 9).numpy(), RATE)
    options = ("--whisper", whisper, "--dev", tmp_path / "dev", "--batch", 2, "--learning-rate", 0.003)
    return (tmp_path / "speech", tmp_path / "out", *options)


def test_the_encoder_learns_cropped_audio(
    whisper: Path,
    cropping: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, cropped, *cropping, "--steps", 20)
    first, *_, last = [line.split(" | ")[1:3] for line in capsys.readouterr().out.splitlines()]
    errors = [[float(cell.split()[-1]) for cell in cells] for cells in (first, last)]
    assert errors[1][0] < 0.9 * errors[0][0], "the states of cropped recordings come closer to those of 30 s"
    # The folder is a checkpoint like the one it came from, the encoder apart.
    before, after = load_file(whisper / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after)
    assert changed
    assert all("encoder." in name and "embed_positions" not in name for name in changed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*cropped.FILES, "training.pt"}
    features.load_encoder(str(tmp_path / "out"))
    with pytest.raises(SystemExit):  # the schedule of a run is that of its options
        run(monkeypatch, cropped, *cropping, "--steps", 40)
    assert "was begun with {'steps': 20" in capsys.readouterr().err


def test_a_stopped_training_of_the_encoder_ends_as_one_that_went_through(
    cropping: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, *options = cropping
    run(monkeypatch, cropped, folder, out, *options, "--steps", 5)
    monkeypatch.setattr(cropped, "SAVE_EVERY", 2)
    whole = cropped.batches

    def stops(*given: Any) -> Iterator[list[Tensor]]:
        yield from itertools.islice(whole(*given), 3)
        raise KeyboardInterrupt

    again = (folder, tmp_path / "again", *options, "--steps", 5)
    with monkeypatch.context() as patch:
        patch.setattr(cropped, "batches", stops)
        with pytest.raises(KeyboardInterrupt):
            run(patch, cropped, *again)
    run(monkeypatch, cropped, *again)
    through, stopped = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert all(torch.equal(through[name], stopped[name]) for name in through)


@pytest.mark.parametrize("what", ["speech", "dev", "noise"])
def test_an_encoder_is_not_trained_on_nothing(
    what: str,
    cropping: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / ("nowhere" if what == "noise" else "empty")
    arguments = [folder, *cropping[1:]] if what == "speech" else [*cropping, f"--{what}", folder]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, cropped, *arguments, "--steps", 1)
    assert str(folder) in capsys.readouterr().err + str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_batches_of_recordings_do_not_depend_on_where_a_run_goes_on(tmp_path: Path) -> None:
    write_speech(tmp_path / "speech")
    synthetic, real = sorted((tmp_path / "speech").glob("*.npz"))
    assert len(cropped.read_speech(synthetic).clips) == 4, "development sentences are left out"
    given: tuple[Any, ...] = ([cropped.read_speech(real)], [synthetic], [], [], 2)
    made = list(itertools.islice(cropped.batches(*given, 0), 12))
    assert all(torch.equal(a, b) for a, b in zip(made[11], next(cropped.batches(*given, 11)), strict=True))
    assert min(len(x) for batch in made for x in batch) >= 0.25 * RATE  # the shortest, made faster
