"""The job on a local Ray with two workers, one of which dies: nothing is lost, and the tree is the local engine's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import fake_recognizer
from tests.crashing import tree
from tests.media_files import voice, write
from tokenthrift.transcription import cli as command_line
from tokenthrift.transcription.cli import main

pytest.importorskip("ray")


@pytest.mark.timeout(300)
def test_a_worker_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        write(tmp_path / "in" / f"{index:02}.wav", voice(0.6, pitch=100 + 10 * index))
    (tmp_path / "in" / "broken.wav").write_text("no sound")
    model = fake_recognizer.save(tmp_path / "model")
    command = [str(tmp_path / "in"), "--model", str(model), "--format", "json", "srt", "jsonl", "--out-dir"]
    assert main([*command, str(tmp_path / "local")]) == 1
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("FAKE_DIES", str(tmp_path / "died"))
    monkeypatch.setattr(command_line, "JobSpec", fake_recognizer.FakeSpec)
    assert main([*command, str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]) == 1
    assert (tmp_path / "died").is_file(), "no worker died, so this has shown nothing"
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
