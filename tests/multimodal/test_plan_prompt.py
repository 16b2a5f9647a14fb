"""`tokenthrift plan PROMPT.yaml`: real files and models, natives without files, and what a prompt may get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.media_files import film
from tokenthrift.cli import main
from tokenthrift.quality import QualityCurve, write_quality

ROOT = Path(__file__).resolve().parents[2]
KARL, SPEECH = str(ROOT / "model_cards/karl-tiny-64"), str(ROOT / "model_cards/mtsk-tiny-en")
VIDEO = str(ROOT / "model_cards/vqtoken-tiny")


@pytest.fixture
def prompt(tmp_path: Path) -> Any:
    """Writes a prompt and runs the command: its exit code, and what it printed."""

    def run(content: Any, *flags: str) -> int:
        path = tmp_path / "prompt.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return main(["plan", str(path), *flags])

    return run


def test_text_picture_clip_recording_and_talking_video(
    prompt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    Image.new("RGB", (80, 60)).save(tmp_path / "photo.png")
    film(tmp_path / "clip.mp4", 50)
    speech = ROOT / "samples/speech/asterisk-agent-pass.flac"
    content = {
        "answer": 16,
        "tokenizer": SPEECH,
        "models": {"image": KARL, "video": VIDEO, "audio": SPEECH, "talking": SPEECH},
        "prompt": [
            {"text": "what do these have in common"},
            {"image": "photo.png"},
            {"video": "clip.mp4", "budget": 64},
            {"audio": str(speech)},
            {"talking": {"seconds": 2.0, "frames": 50}, "name": "a talk"},
            "and why",
        ],
    }
    # Nothing is computed: a model that is run would fail on the meta device, and none may be loaded.
    monkeypatch.setattr(torch.nn.Module, "to", None)
    assert prompt(content, "--context", "200", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 200
    assert found["reserved"] == 16
    assert sum(row["tokens"] for row in found["items"]) == found["tokens"] <= 184
    kinds = [row["kind"] for row in found["items"]]
    assert kinds == ["text", "image", "video", "audio", "talking", "text"]
    natives = [row["native"] for row in found["items"]]
    assert natives[1:3] == [32, 512]
    assert natives[4] == 100 + 50
    assert found["items"][0]["tokens"] == natives[0] > 0
    assert found["items"][2]["tokens"] <= 64
    assert prompt(content, "--context", "400", "--split", "equal") == 0
    table = capsys.readouterr()
    assert "a talk" in table.out
    assert "kept free for the answer" in table.err


def test_natives_and_reducers_need_no_files(prompt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["image"] * 3 + ["video"] * 2 + ["audio"]
    natives = [729, 729, 2916, 6272, 3136, 1500]
    content = {
        "context": 1024,
        "models": dict.fromkeys(("image", "video", "audio"), "merging"),
        "prompt": [{name: native} for name, native in zip(names, natives, strict=True)],
    }
    assert prompt(content, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in found["items"]] == [49, 49, 195, 420, 210, 101]


def test_a_split_by_value_reads_the_curves_beside_the_models(
    prompt: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"context": 40, "models": {"image": "model"}, "prompt": [{"image": {}}, {"image": {}}]}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((Path(KARL) / "config.json").read_bytes())
    assert prompt(content, "--split", "value") == 2
    assert "no curve of quality against tokens" in capsys.readouterr().err
    write_quality(folder, [QualityCurve(tokens=(1, 8, 32), quality=(0.2, 0.7, 0.71), kind="image")])
    assert prompt(content, "--split", "value", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["tokens"] for row in found["items"]] == [32, 8]
    assert found["items"][1]["expected_quality"] == 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt: [", "not readable as YAML"),
        ("- text: x", "a mapping with a list `prompt`"),
        ({"prompt": []}, "has no size"),
        ({"context": 9, "promt": [], "prompt": []}, "did you mean 'prompt'"),
        ({"context": -1, "prompt": []}, "context is a whole number"),
        ({"context": 9, "split": "fair", "prompt": []}, "known: demand, value, equal"),
        ({"context": 9, "prompt": [{"text": "x"}]}, "item 1: text without a count"),
        ({"context": 9, "prompt": [{"text": "x", "tokens": -2}]}, "tokens is a whole number"),
        ({"context": 9, "prompt": [3]}, "item 1: expected a mapping"),
        ({"context": 9, "prompt": [{"image": 3, "video": 4}]}, "expected one of text, image"),
        ({"context": 9, "prompt": [{"image": 3}]}, "no model for image"),
        ({"context": 9, "models": {"picture": "merging"}, "prompt": []}, "models: unknown key 'picture'"),
        ({"context": 9, "models": {"image": "merging"}, "prompt": [{"image": "a.png"}]}, "reads no files"),
        ({"context": 9, "models": {"image": KARL}, "prompt": [{"image": "a.png"}]}, "there is no file"),
        ({"context": 9, "models": {"image": "merging"}, "prompt": [{"image": {"nativ": 3}}]}, "any of native"),
        (
            {"context": 9, "models": {"image": "merging"}, "prompt": [{"image": 3, "wieght": 2}]},
            "did you mean 'weight'",
        ),
        ({"context": 9, "models": {"image": "merging"}, "prompt": [{"image": 3, "weight": "x"}]}, "a weight is"),
        (
            {"context": 1, "models": {"image": "merging"}, "prompt": [{"image": 3}, {"image": 3}]},
            "least that its items",
        ),
        ({"context": 9, "models": {"image": "nowhere/at-all-9"}, "prompt": [{"image": 3}]}, "nowhere/at-all-9"),
    ],
)
def test_what_is_wrong_is_named(
    prompt: Any, content: Any, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert prompt(content) == 2
    assert message in capsys.readouterr().err


def test_the_prompt_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["plan", "prompt.yaml", "--help"])
    assert done.value.code == 0
    assert "--context" in capsys.readouterr().out
