"""Checkpoints that hold more than tensors are read without running what they name, or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenthrift.sources import WeightsError
from tokenthrift.untrusted import read_checkpoint, tensors_in


class Runs:
    """Writes a file when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def saved(path: Path, **more: object) -> Path:
    torch.save({"model": {"a": torch.arange(3.0)}, **more}, path)
    return path


def test_what_a_training_leaves_behind_becomes_inert(tmp_path: Path) -> None:
    options = argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=Path("x")), order=OrderedDict(a=1))
    path = saved(tmp_path / "c.pth", args=options)
    with pytest.raises(WeightsError, match=r"asks for argparse.Namespace, pathlib"):
        read_checkpoint(path)
    found = read_checkpoint(path, ["argparse.Namespace", "pathlib."])
    assert torch.equal(tensors_in(found["model"], path)["a"], torch.arange(3.0))
    assert not isinstance(found["args"], argparse.Namespace)
    assert vars(found["args"]) == {}


def test_a_class_that_is_nowhere_installed_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vanished_package")
    exec("class Task:\n    pass\nclass Items(list):\n    pass\nclass Map(dict):\n    pass", module.__dict__)
    for name in ("Task", "Items", "Map"):
        getattr(module, name).__module__ = "vanished_package"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "vanished_package", module)
        task = module.Task()
        task.options = {"a": 1}
        path = saved(tmp_path / "c.pt", task=task, items=module.Items([1, 2]))
        beyond = saved(tmp_path / "d.pt", map=module.Map(a=1))
    found = read_checkpoint(path, ["vanished_package."])
    assert list(found["model"]) == ["a"]
    assert list(found["items"]) == []
    with pytest.raises(WeightsError, match=r"cannot be read safely: Can only SETITEM"):
        read_checkpoint(beyond, ["vanished_package."])


def test_code_is_refused_and_never_runs(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = saved(tmp_path / "c.pth", args=Runs(trap))
    for inert in ((), ("argparse.Namespace",)):
        with pytest.raises(WeightsError, match=r"asks for (posix|nt)\.system"):
            read_checkpoint(path, inert)
    with pytest.raises(WeightsError):
        read_checkpoint(path, ["posix.", "nt."])  # not even where a converter asks for it
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap is none"


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    path = tmp_path / "c.pkl"
    path.write_bytes(pickle.dumps({"model": Runs(trap)}))
    with pytest.raises(WeightsError, match="no checkpoint that can be read safely"):
        read_checkpoint(path, ["posix."])
    assert not trap.exists()


def test_damage_and_absence(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.pth")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_state_dict_holds_tensors(tmp_path: Path) -> None:
    for wrong in (None, [1], {"a": 1}, {1: torch.zeros(1)}):
        with pytest.raises(WeightsError, match="holds no state dict"):
            tensors_in(wrong, tmp_path)
