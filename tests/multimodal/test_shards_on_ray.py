"""`tokenize --engine ray` on a local Ray with two workers, one of which dies: the tree is the local engine's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.crashing import tree
from tests.multimodal.test_shards import picture, write_table, write_tar
from tests.tokenizers.karl.tiny_karl import tiny_config, tiny_karl
from tokenthrift.budget import TokenBudget
from tokenthrift.cli import main
from tokenthrift.karl.files import ImageFiles
from tokenthrift.shards import work

pytest.importorskip("ray")


class MortalFiles(ImageFiles):
    """Dies once in the middle of a shard, by kill -9."""

    def tokenize(self, items: Sequence[Any], budget: TokenBudget) -> list[dict[str, Any]]:
        rows = super().tokenize(items, budget)
        died = Path(os.environ["TOKENIZER_DIES"])
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


class MortalSpec(work.TokenSpec):
    """A job whose workers die: unpickling it imports this file."""

    __slots__ = ()

    def tokenizer(self) -> Any:
        made: Any = super().tokenizer()
        made.__class__ = MortalFiles
        return made


@pytest.mark.timeout(300)
def test_a_worker_that_dies_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    tiny_karl(tiny_config(grid=(4, 4)), decisive=True).save_pretrained(model)
    for i in range(4):
        write_tar(tmp_path / "in" / f"{i}.tar", [(f"{j}.png", picture(10 * i + j)) for j in range(5)])
    write_table(tmp_path / "in" / "t.parquet", image=[picture(50), b"broken", picture(52)])
    for i in range(5):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(60 + i))
    fixed = [
        "tokenize",
        str(tmp_path / "in"),
        "--model",
        str(model),
        "--shard-size",
        "2",
        "--threads",
        "1",
        "--out-dir",
    ]
    assert main([*fixed, str(tmp_path / "local")]) == 1
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("TOKENIZER_DIES", str(tmp_path / "died"))
    monkeypatch.setattr(work, "TokenSpec", MortalSpec)
    assert main([*fixed, str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]) == 1
    assert (tmp_path / "died").is_file(), "no worker died, so this has shown nothing"
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
