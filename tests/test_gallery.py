"""The drawing of a decoding has the rounds of diffusion, not only the certified text that is the default."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_drawing_of_a_decoding_shows_its_rounds(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "docs" / "gallery.py"))["dllm_rounds"](tmp_path)
    drawing = (tmp_path / "dllm_rounds.svg").read_text(encoding="utf-8")
    lines = re.findall(r"<g>(.*?)</g>", drawing)
    captions = re.findall(r'class="c"[^>]*>([^<]+)<', drawing)
    assert captions[:2] == ["one round alone", "before round 1"]
    assert captions[-2:] == ["by diffusion", "certified: left to right"]
    assert [line.count("<rect") > 0 for line in (lines[0], lines[1], lines[-2], lines[-1])] == [
        False,
        True,
        False,
        False,
    ]
