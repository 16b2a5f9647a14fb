"""The benchmark of VQToken: memory along a stream, in the unit that its columns name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.recipes.benchmark_scripts import load_benchmark


def test_memory_is_told_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("vqtoken")
    monkeypatch.setattr(benchmark.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=1_000_000))  # KiB
    rows = benchmark.stream_hour(4, 2)
    assert [row["frames"] for row in rows] == [2, 4]
    assert [row["peak_mb"] for row in rows] == [1024.0, 1024.0]
    assert 50 < rows[0]["resident_mb"] < 50_000
