"""What the demo page shows; tests/harnesses/test_demo_page.py opens the page itself, where gradio is."""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.asr.tiny_mtsk import tiny_model as tiny_mtsk
from tests.media_files import film
from tests.tokenizers.karl.tiny_karl import tiny_karl
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.commands import demo
from tokenthrift.demo import showing
from tokenthrift.demo.showing import models_for, respond, show

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "samples/pictures/street.jpg")
RECORDING = str(ROOT / "samples/speech/librivox-0880.flac")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_karl().save_pretrained(folder / "karl")
    tiny_dllm("whisper").save_pretrained(folder / "dllm")
    tiny_mtsk(tasks=("asr", "vsr", "avsr")).save_pretrained(folder / "mtsk")
    tiny_answerer().save_pretrained(folder / "clips")
    return {name: str(folder / name) for name in ("karl", "dllm", "mtsk", "clips")}


def test_a_picture_a_clip_and_a_recording(models: dict[str, str], tmp_path: Path) -> None:
    clip = str(film(tmp_path / "clip.mp4", 12))
    for model, path in (("karl", PICTURE), ("clips", clip), ("mtsk", RECORDING)):
        few, all_of_them = (show(models[model], path, share, 2) for share in (0.2, 1.0))
        assert few.used.used <= few.planned.used <= 0.2 * few.planned.native
        assert few.used.used < all_of_them.used.used
        assert (few.picture is None) == (model == "mtsk")
        assert few.picture is None or Path(few.picture).read_bytes().startswith(b"\x89PNG")
    one = show(models["dllm"], RECORDING, 0.3, 1)
    assert one.used.rounds is not None
    assert one.used.rounds <= 1


def test_without_a_limit_of_rounds_speech_is_decoded_as_the_model_is_set(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = showing.loaded(models["dllm"])
    monkeypatch.setattr(model, "config", replace(model.config, decode=replace(model.config.decode, certify="ar")))
    assert show(models["dllm"], RECORDING, 1.0, 0).used.written is not None
    assert show(models["dllm"], RECORDING, 1.0, 2).used.written is None


def test_models_are_chosen_by_what_a_file_holds(models: dict[str, str], tmp_path: Path) -> None:
    every = list(models.values())
    assert models_for(PICTURE, every) == [models["karl"]]
    assert models_for(RECORDING, every) == [models["dllm"], models["mtsk"]]
    assert models["clips"] in models_for(str(film(tmp_path / "clip.mp4", 4)), every)
    (tmp_path / "x.txt").write_text("nothing")
    assert models_for(str(tmp_path / "x.txt"), every) == []


def test_a_file_that_cannot_be_read_is_explained(models: dict[str, str], tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", 12).read_bytes()
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    huge = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    silent = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36, b"WAVEfmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", 0)
    odd = {
        "empty.mp4": b"",
        "words.wav": b"these are words\n" * 50,
        "cut.mp4": whole[: len(whole) // 2],
        "cut.jpg": Path(PICTURE).read_bytes()[:500],
        "cut.flac": Path(RECORDING).read_bytes()[:60],
        "huge.png": huge,
        "silent.wav": silent,
    }
    for name, content in odd.items():
        (tmp_path / name).write_bytes(content)
        said, text, picture = respond(str(tmp_path / name), None, 50, 0, list(models.values()))
        assert said.startswith(name)
        assert len(said) > len(name) + 10
        assert str(tmp_path) not in said
        assert (text, picture) == ("", None)
    assert respond(None, None, 50, 0, [])[0].startswith("Drop")
    said, _, picture = respond(PICTURE, models["dllm"], 50, 0, list(models.values()))
    assert said.startswith(models["karl"])
    assert picture


def test_without_models_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenthrift.models.list_models", list)
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    assert demo.main([]) == 1
    assert "no models here" in capsys.readouterr().err
