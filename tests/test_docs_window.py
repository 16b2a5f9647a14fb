"""The Python of docs/window.md and docs/reducers.md runs as it stands; every reducer has its row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenthrift.reducers import REDUCERS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", ["window.md", "reducers.md"])
def test_every_block_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_every_reducer_has_a_row() -> None:
    text = (ROOT / "docs" / "reducers.md").read_text(encoding="utf-8")
    assert [name for name in REDUCERS if f"`{name}`" not in text] == []
