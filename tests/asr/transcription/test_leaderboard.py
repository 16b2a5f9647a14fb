"""The open ASR leaderboard's script, on a local manifest."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests import fake_recognizer
from tests.media_files import voice, write

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "open_asr_leaderboard" / "run_eval.py"


def test_its_lines_are_the_leaderboards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a clip in order, texts normalized, clips without a reference left out, the time shared out by length."""
    model = fake_recognizer.save(tmp_path / "model")
    said = {"a": "Pitch, 140!", "b": "pitch 140 and more", "c": "", "d": "pitch 140"}
    entries = []
    for number, (name, text) in enumerate(said.items()):
        write(tmp_path / f"{name}.wav", voice(0.6 + 0.1 * number))
        entries.append(json.dumps({"audio_filepath": f"{name}.wav", "text": text}))
    (tmp_path / "clips.jsonl").write_text("\n".join(entries) + "\n\n")
    options = {"model_id": model, "manifest": tmp_path / "clips.jsonl", "dataset": "own", "split": "test"}
    options |= {"out": tmp_path / "results", "batch_size": 3}
    monkeypatch.setattr(sys, "argv", ["run_eval.py", *(f"--{name}={value}" for name, value in options.items())])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (path,) = (tmp_path / "results").glob("MODEL_*_own_test.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [Path(row["audio_filepath"]).stem for row in rows] == ["a", "b", "d"]
    assert [row["text"] for row in rows] == ["pitch 140", "pitch 140 and more", "pitch 140"]
    assert [row["pred_text"] for row in rows] == ["pitch 140"] * 3
    assert [row["duration"] for row in rows] == [0.6, 0.7, 0.9]
    assert all(set(row) == {"audio_filepath", "duration", "time", "text", "pred_text"} for row in rows)
    assert rows[1]["time"] == pytest.approx(rows[0]["time"] * 7 / 6), "one batch, shared out by seconds"
    assert "WER 25.00 %" in capsys.readouterr().out
