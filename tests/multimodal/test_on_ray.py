"""What workers on Ray share with the process that starts them, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenthrift.jobs import on_ray
from tokenthrift.jobs.on_ray import ClusterError, map_on_ray


def test_relative_names_are_those_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster that was there before begin in another folder."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    worker = on_ray._Actor(lambda: lambda items: [Path(name).read_text() for name in items], (), str(tmp_path / "job"))
    assert list(worker.work(["a.txt"])) == ["here"]
    elsewhere = on_ray._Actor(lambda: lambda items: items, (), str(tmp_path / "of another machine"))
    assert list(elsewhere.work([1])) == [1]


def test_a_cluster_that_does_not_start_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain Exception, a ConnectionError or a ValueError."""

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr("tokenthrift.extras.require", lambda name: ray)
    with pytest.raises(ClusterError, match=r"^Ray: The current node timed out during startup\.$"):
        list(map_on_ray(lambda: list, (), [1], workers=1))


def test_what_ends_the_workers_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception):
        pass

    def rows() -> Iterator[Any]:
        raise RayError("The actor died in its creation task:\n  File ...\nConfigError: no model in x\n")

    mapped = SimpleNamespace(map_batches=lambda *_, **__: SimpleNamespace(iter_rows=rows))
    modules = {
        "ray": SimpleNamespace(
            is_initialized=lambda: True, cluster_resources=dict, exceptions=SimpleNamespace(RayError=RayError)
        ),
        "ray.data": SimpleNamespace(
            DataContext=SimpleNamespace(get_current=SimpleNamespace),
            from_items=lambda *_, **__: mapped,
            ActorPoolStrategy=SimpleNamespace,
        ),
    }
    monkeypatch.setattr("tokenthrift.extras.require", modules.__getitem__)
    with pytest.raises(ClusterError, match="^Ray: ConfigError: no model in x$"):
        list(map_on_ray(lambda: list, (), [1], workers=1))
