"""Every reducer has its row in docs/reducers.md; the blocks of the page run in test_documents.py."""

from __future__ import annotations

from pathlib import Path

from tokenthrift.reducers import REDUCERS

ROOT = Path(__file__).resolve().parents[1]


def test_every_reducer_has_a_row() -> None:
    text = (ROOT / "docs" / "reducers.md").read_text(encoding="utf-8")
    assert [name for name in REDUCERS if f"`{name}`" not in text] == []
