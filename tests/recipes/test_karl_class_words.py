"""The recipe that lets a small Llama name photos from KARL's tokens, end to end on pictures of plain colors."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tokenizers.karl.tiny_karl import tiny_config, tiny_karl

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "karl"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module("class_words")


def test_from_photos_to_a_report(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    karl = tiny_karl(tiny_config(codebook_size=None, grid=(4, 4)), decisive=True)
    with torch.no_grad():
        karl.to_tokens.weight.mul_(20)  # untrained, they are too faint beside the positions to be learned from soon
    karl.save_pretrained(tmp_path / "model")
    labels = np.arange(50_000) % 2
    np.savez(tmp_path / "cifar.npz", label=labels.astype(np.uint8), names=np.array(["ox", "deer"]))
    for part, count in (("train", 32), ("test", 20)):
        shade = labels[list(recipe.PHOTOS[part])[:count]][:, None, None, None] * 200
        noise = np.random.default_rng(count).integers(0, 50, (count, 3, 16, 16))
        np.save(tmp_path / f"photos_{part}.npy", (shade + noise).astype(np.uint8))
    arguments = ["--model", tmp_path / "model", "--cifar", tmp_path / "cifar.npz", "--data", tmp_path]
    arguments += ["--out", tmp_path / "out", "--steps", 250, "--batch", 16, "--hidden-size", 64, "--layers", 1]
    monkeypatch.setattr(sys, "argv", ["class_words", *map(str, arguments)])
    recipe.main()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = report["tables"][0]["rows"]
    assert [row["mean"] for row in rows[:-1]] == [1, 2, 4, 8]
    assert all(row["accuracy"] >= 0.9 for row in rows), "dark is an ox, bright a deer; half would be chance"
    assert (tmp_path / "out" / "accuracy_against_tokens.png").stat().st_size > 1000
    assert "20 photos kept out" in capsys.readouterr().out


def test_spelling(recipe: Any) -> None:
    ids, mask = recipe.spelled(["ox", "deer"])
    assert ids[0, :3].tolist() == [14, 23, 26]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    rows = torch.cat(list(recipe.batches(5, 2, 4, torch.Generator().manual_seed(0))))
    assert sorted(rows[:4].tolist()) == sorted(set(rows[:4].tolist()))
