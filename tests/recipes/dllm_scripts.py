"""Scripts of the dLLM-ASR recipe as modules, and as commands; speech shards for them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.asr.tiny_dllm import speech

RATE = 16_000
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "dllm_asr"


def script(name: str) -> Any:
    """A script of the recipe as a module; scripts import each other by their bare names."""
    if str(RECIPE) not in sys.path:
        sys.path.insert(0, str(RECIPE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPE))


def run(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def write_speech(folder: Path) -> None:
    """One synthetic shard, with a development sentence, and one of real speech."""
    folder.mkdir()
    clips = [(speech(0.5, i).numpy() * 32767).astype(np.int16) for i in range(4)]
    clips.append(np.ones(31 * RATE, np.int16))  # longer than one pass of the encoder holds
    offset = np.cumsum([0, *map(len, clips)])
    for name, splits in (("0003-slt", ["train", "dev", "train", "train", "train"]), ("9000-real", ["train"] * 5)):
        rows = [{"id": str(i), "text": "abcde"[i], "split": split} for i, split in enumerate(splits)]
        np.savez(folder / f"{name}.npz", audio=np.concatenate(clips), offset=offset, rows=np.array(json.dumps(rows)))
