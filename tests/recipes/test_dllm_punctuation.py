"""The recipe of the punctuation head: it learns what the states say, and leaves all other weights as they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.asr.tiny_dllm import speech, tiny_model
from tests.recipes.dllm_scripts import script
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.punctuation import PunctuationHead

punctuation, cased_labels = script("punctuation"), script("cased_labels")

TEXTS = [("the fox said no", "The fox said, no."), ("is it there", "Is it there?"), ("one two", "One two.")]


def write_shard(path: Path) -> Path:
    path.mkdir()
    clips = [(speech(0.8, seed=i) * 32_767).short().numpy() for i in range(24)]
    rows = [{"id": f"clip{i}", "text": TEXTS[i % 3][0], "split": "train"} for i in range(24)]
    offset = np.cumsum([0, *map(len, clips)])
    np.savez(path / "9100-some.npz", audio=np.concatenate(clips), offset=offset, rows=np.array(json.dumps(rows)))
    np.savez(path / "9000-other.npz", audio=np.zeros(1), offset=np.array([0, 1]), rows=np.array(json.dumps([rows[0]])))
    return path


def test_from_labels_to_a_model_that_punctuates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, labels = write_shard(tmp_path / "speech"), tmp_path / "labels.jsonl"

    def heard(clips: list[object], whisper: str, threads: int) -> object:
        assert whisper == "base"
        return ((clip, TEXTS[clip.row % 3][1]) for clip in clips)  # type: ignore[attr-defined]

    monkeypatch.setattr(cased_labels, "transcripts", heard)
    monkeypatch.setattr(sys, "argv", ["cased_labels.py", str(folder), str(labels), "--portion", "10"])
    for done in (10, 20, 24):
        cased_labels.main()
        assert f"{done} of 24 clips" in capsys.readouterr().out
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == [*range(24)], "every clip once, those before the first shard not"
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(labels), str(folder), str(tmp_path / "out")]
    monkeypatch.setattr(
        sys, "argv", ["punctuation.py", *arguments, "--epochs", "150", "--hidden-size", "16", "--rate", "0.01"]
    )
    punctuation.main()
    said = dict(part.rsplit(" ", 1) for part in capsys.readouterr().out.splitlines()[1].partition(" (")[0].split(", "))
    assert float(said["case_accuracy"]) > 0.9
    assert float(said["mark_accuracy"]) > 0.9
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "out"))
    assert before == after, "the head has a file of its own"
    head = load_file(tmp_path / "out" / "punctuation.safetensors")
    loaded = DllmAsr.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.punctuation, PunctuationHead)
    assert {name: tensor.tolist() for name, tensor in loaded.punctuation.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in head.items()
    }


def test_labels_are_a_choice_that_grows(tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "speech")
    some = cased_labels.chosen(folder, 5, 9100, seed=0)
    assert cased_labels.chosen(folder, 9, 9100, seed=0)[:5] == some
    assert len({clip.id for clip in some}) == 5
