"""The scripts of examples/ run as they stand; the models that are not shipped are tiny ones with random weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.multimodal.tiny_processors import save_qwen
from tokenthrift.models import load

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PICTURES = [str(path) for path in sorted((ROOT / "samples" / "pictures").glob("*.jpg"))]
SPEECH = [str(path) for path in sorted((ROOT / "samples" / "speech").glob("librivox-08*.flac"))][:2]


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_there_are_five_of_under_sixty_lines_each() -> None:
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60
        assert f"python examples/{path.name}" in text
        assert path.name in Path(__file__).read_text(encoding="utf-8")


def test_karl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("karl_in_20_lines.py", monkeypatch, *PICTURES)
    shown = capsys.readouterr().out
    assert "4 of 32 tokens" in shown
    assert "bytes for 2 pictures of 64 x 64" in shown


def test_transcribe_and_refine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("transcribe_and_refine.py", monkeypatch, *SPEECH)
    assert "of 2 refined" in capsys.readouterr().out


def test_rates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("train_your_own_rates.py", monkeypatch, "samples/speech", str(tmp_path / "m"), "8", "2")
    assert "step 1: loss" in capsys.readouterr().out
    assert load(tmp_path / "m").config.audio_rates == (8,)


def test_window(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("one_window.py", monkeypatch, "512")
    shown = capsys.readouterr().out
    assert shown.count("window of 512") == 2
    for line in shown.splitlines():
        if line.startswith("split"):
            assert int(line.split(": ")[1].split()[0]) <= 512 - 64


def test_attach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("attach_to_qwen_vl.py", monkeypatch, save_qwen(tmp_path / "qwen"), PICTURES[1], "What is it?")
    lines = capsys.readouterr().out.splitlines()
    assert "of" in lines[2]
    assert lines[0].split(": ", 1)[1] == lines[-1].split(": ", 1)[1]
