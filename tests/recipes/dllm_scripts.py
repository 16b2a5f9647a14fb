"""Scripts of the dLLM-ASR recipe as modules, and as commands."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

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
