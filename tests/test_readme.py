"""The Python of README.md runs as it stands, one block after the other, as a reader would try it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.media_files import film
from tests.multimodal.tiny_vlms import Clip, Picture, encode, shared

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    hours = film(tmp_path / "hours.mp4", 75)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        # What the text calls a live model, and its inputs.
        names["model"] = shared("llava_onevision")
        names["inputs"] = encode(names["model"], [[10, Picture(1), Clip(2), 11]])
        exec(compile(block.replace("hours.mp4", str(hours)), "README.md", "exec"), names)
    assert names["stream"].frames == 3
    assert names["tokens"].usage[0].used <= 32
    assert "native=588" in capsys.readouterr().out
