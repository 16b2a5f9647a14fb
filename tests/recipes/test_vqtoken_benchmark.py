"""The benchmark of VQToken: memory along a stream, in the unit that its columns name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "vqtoken.py"


def test_memory_is_told_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("benchmark_of_vqtoken", FILE)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=1_000_000))  # KiB
    rows = benchmark.stream_hour(4, 2)
    assert [row["frames"] for row in rows] == [2, 4]
    assert [row["peak_mb"] for row in rows] == [1024.0, 1024.0]
    assert 50 < rows[0]["resident_mb"] < 50_000
