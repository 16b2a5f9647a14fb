"""Collections as shards: in and out as WebDataset and Parquet, the same bytes however often it was killed."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from tests.crashing import forked, killed_at, tree
from tests.tokenizers.karl.tiny_karl import tiny_config, tiny_karl
from tokenthrift.budget import TokenBudget
from tokenthrift.cli import main
from tokenthrift.jobs.journal import FOLDER
from tokenthrift.karl.files import ImageFiles
from tokenthrift.karl.model import Karl
from tokenthrift.media.image import read_image_bytes


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.table(columns), path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    tiny_karl(tiny_config(grid=(4, 4)), decisive=True).save_pretrained(folder)
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    """Seven pictures in a tar with captions, six in a table, five in folders; one of each is broken."""
    root = tmp_path / "in"
    members = [(f"{i:04}.{kind}", data) for i in range(6) for kind, data in (("txt", b"hi"), ("png", picture(i)))]
    write_tar(root / "a" / "train.tar", [*members, ("0006.png", b"no picture")])
    write_table(root / "b" / "train.parquet", image=[*map(picture, range(10, 15)), b"broken"], text=list("abcdef"))
    (root / "sub").mkdir()
    for i, name in enumerate(("x.png", "sub/x.png", "sub/v1.2.png", "z.png")):
        (root / name).write_bytes(picture(20 + i))
    (root / "broken.png").write_bytes(picture(0)[:60])
    return root


def run(collection: Path, model: Path, out: Path, *options: str) -> int:
    return main(
        ["tokenize", str(collection), "--model", str(model), "--out-dir", str(out), "--shard-size", "3", *options]
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    """All rows of WebDataset shards in the order of the listing, read by the package `webdataset`."""
    shards = [str(out / json.loads(line)["shard"]) for line in (out / "shards.jsonl").read_text().splitlines()]
    reader = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [{"__key__": sample["__key__"], **json.loads(sample["json"])} for sample in reader]


def test_every_item_has_a_row_that_other_readers_read(
    collection: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(collection, model, tmp_path / "out", "--budget", "4") == 1
    rows = rows_of(tmp_path / "out")
    listing = [json.loads(line) for line in (tmp_path / "out" / "shards.jsonl").read_text().splitlines()]
    assert [line["items"] for line in listing] == [3, 3, 1, 3, 3, 3, 2]
    assert [line["shard"] for line in listing[2:6]] == [
        "a/train-00002.tar",
        "b/train-00000.tar",
        "b/train-00001.tar",
        "files-00000.tar",
    ]
    assert len(rows) == 18
    assert all(row["__key__"] == row["key"] for row in rows)
    broken = [row for row in rows if row["status"] == "failed"]
    assert [Path(row["file"]).name for row in broken] == ["0006.png", "train.parquet#5", "broken.png"]
    assert all(row["type"] == "ImageError" and row["failed"] and "/tmp" not in row["failed"] for row in broken)
    by_file = {row["file"]: row for row in rows}
    karl = Karl.from_pretrained(model)
    for source, seed in ((f"{collection}/a/train.tar/0003.png", 3), (f"{collection}/b/train.parquet#1", 11)):
        tokens = karl.encode(read_image_bytes(picture(seed), "a.png")[None], "4")
        assert tokens.codes is not None
        assert by_file[source]["codes"] == tokens.codes[0].tolist()
    assert "15 images: 60 tokens" in capsys.readouterr().err
    assert run(collection, model, tmp_path / "out", "--budget", "4") == 1, "the failed ones are still failed"
    assert "0 of 4 parts of the collection to do" in capsys.readouterr().err


def test_lines_and_tables_say_the_same(
    collection: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(collection, model, tmp_path / "tars") == 1
    assert run(collection, model, tmp_path / "tables", "--format", "parquet") == 1
    capsys.readouterr()
    assert main(["tokenize", str(collection), "--model", str(model), "--codes"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = rows_of(tmp_path / "tars")
    names = [json.loads(line)["shard"] for line in (tmp_path / "tables" / "shards.jsonl").read_text().splitlines()]
    tables = [pq.read_table(tmp_path / "tables" / name) for name in names]
    assert len({str(table.schema) for table in tables}) == 1, "also of a shard in which all have failed"
    table = [row for each in tables for row in each.to_pylist()]
    for line, row, found in zip(lines, rows, table, strict=True):
        assert row == {"__key__": row["key"], "key": row["key"], **line}
        assert {name: value for name, value in found.items() if value is not None} == {"key": row["key"], **line}


def test_killed_at_random_moments(collection: Path, model: Path, tmp_path: Path) -> None:
    """Nothing is half, nothing is lost, and the tree at the end is that of a run nobody disturbed."""
    assert forked(lambda: run(collection, model, tmp_path / "whole")) == 1
    whole, draw, kills, rounds = tree(tmp_path / "whole"), random.Random(1), 0, 0
    while kills < 8:
        event, torn, out = draw.randint(1, 18), draw.choice((0, 1, 30)), tmp_path / f"out-{rounds}"

        def die(event: int = event, torn: int = torn, out: Path = out) -> int:
            killed_at(event, torn)
            return run(collection, model, out)

        code = forked(die)
        kills += code == -signal.SIGKILL
        assert code in (-signal.SIGKILL, 1)
        present = {name for name in tree(out) if FOLDER not in name and not Path(name).name.startswith(".")}
        assert all((out / name).read_bytes() == whole[name] for name in present - {"shards.jsonl"})
        if code == 1:
            assert tree(out) == whole
            rounds += 1
    assert forked(lambda: run(collection, model, tmp_path / f"out-{rounds}")) == 1
    assert tree(tmp_path / f"out-{rounds}") == whole


def test_parts_make_the_tree_of_one_run(
    collection: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(collection, model, tmp_path / "whole")
    for part in ("2/3", "1/3", "3/3"):
        run(collection, model, tmp_path / "parts", "--shard", part)
    capsys.readouterr()
    assert run(collection, model, tmp_path / "parts") == 1, "which only puts the listing together"
    assert "0 of 4 parts" in capsys.readouterr().err
    whole, parts = tree(tmp_path / "whole"), tree(tmp_path / "parts")
    assert {name: parts[name] for name in whole} == whole


def test_what_changed_is_done_again_and_what_is_too_much_goes(
    collection: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(collection, model, out)

    def todo(*options: str) -> str:
        capsys.readouterr()
        run(collection, model, out, *options)
        return capsys.readouterr().err.split(" of ")[0]

    assert todo() == "0"
    assert todo("--batch-size", "2") == "0"
    assert todo("--budget", "2") == "4"
    (collection / "z.png").unlink()
    (collection / "broken.png").unlink()
    assert todo("--budget", "2") == "1"
    assert not (out / "files-00001.tar").exists(), "a shard that the collection no longer has"
    assert len(rows_of(out)) == 16
    (out / "a" / "train-00001.tar").unlink()
    assert todo("--budget", "2") == "1"
    assert len(rows_of(out)) == 16


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_of_the_machine_is_done_again_alone(
    collection: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: bool,
) -> None:
    """Out of memory at one item: the shards behind its own stay, and the next run makes its own only."""
    assert run(collection, model, tmp_path / ("out" if before else "whole")) == 1
    out, tokenize, calls = tmp_path / "out", ImageFiles.tokenize, 0
    whole = tree(out if before else tmp_path / "whole")

    def short_of_memory(self: ImageFiles, items: Sequence[Any], budget: TokenBudget) -> list[dict[str, Any]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return tokenize(self, items, budget)

    monkeypatch.setattr(ImageFiles, "tokenize", short_of_memory)
    capsys.readouterr()
    assert run(collection, model, out, "--batch-size", "1", "--overwrite") == 1
    assert "14 images" in capsys.readouterr().err
    assert {name for name in tree(out) if name.endswith(".tar")} == {name for name in whole if name.endswith(".tar")}
    assert [row["type"] for row in rows_of(out) if row["status"] == "failed"].count("MemoryError") == 1
    assert run(collection, model, out) == 1
    assert "a/train-00000.tar: 3 images\n15 images" in capsys.readouterr().err, "that shard and no other"
    assert tree(out) == whole


def test_files_of_others_stay(
    collection: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "train-00000.tar").write_text("mine")
    assert run(collection, model, out) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert (out / "a" / "train-00000.tar").read_text() == "mine"
    assert run(collection, model, out, "--overwrite") == 1
    assert len(rows_of(out)) == 18
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "linked").mkdir()
    os.symlink(elsewhere, tmp_path / "linked" / "a")
    assert run(collection, model, tmp_path / "linked") == 2
    assert not list(elsewhere.iterdir())
    for options in (["--out-dir", str(collection / "out")], ["--engine", "ray"], ["--shard", "1/2"]):
        assert main(["tokenize", str(collection), "--model", str(model), *options]) == 2


@pytest.mark.parametrize("form", ["webdataset", "parquet", "jsonl"])
def test_names_that_are_no_text(model: Path, tmp_path: Path, form: str) -> None:
    """Bytes that are no UTF-8, marks that have a meaning elsewhere, and members without a name to keep."""
    names = ["\udcff.png", "a\tb.png", "'; rm -rf ~.png", "../x.png", "e\u0301.png", "%2e%2e.png"]
    write_tar(tmp_path / "in.tar", [(name, picture(i)) for i, name in enumerate(names)])
    out = ["--out-dir", str(tmp_path / "out"), "--format", form]
    assert main(["tokenize", str(tmp_path / "in.tar"), "--model", str(model), *out]) == 1
    (line,) = map(json.loads, (tmp_path / "out" / "shards.jsonl").read_text().splitlines())
    assert (line["completed"], line["failed"]) == (4, 2)


def test_names_never_collide(model: Path, tmp_path: Path) -> None:
    """Inputs of one name, members of one name, names that differ in case, and a file called as the loose ones are."""
    same = [("a.png", picture(1)), ("a.PNG", picture(2)), ("A.png", picture(3)), ("a.b.png", picture(4))]
    write_tar(tmp_path / "in" / "files.tar", [*same, ("a.png", picture(5)), ("d/a.png", picture(6))])
    write_table(tmp_path / "in" / "files.parquet", image=[picture(7)])
    (tmp_path / "in" / "x.png").write_bytes(picture(8))
    (tmp_path / "in" / "x.bmp").write_bytes(picture(9))
    assert main(["tokenize", str(tmp_path / "in"), "--model", str(model), "--out-dir", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 9
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        assert len({row["key"].casefold() for row in rows[start:stop]}) == stop - start
    assert len({row["file"] for row in rows}) == 8, "two members of the tar have one name"


@pytest.mark.parametrize(
    ("columns", "option", "reason"),
    [
        ({"a": [b"1"], "b": [b"2"]}, (), "--column chooses"),
        ({"a": ["text"]}, (), "0 columns of bytes"),
        ({"a": [b"1"]}, ("--column", "b"), "no column 'b'"),
    ],
)
def test_the_column_of_bytes(
    model: Path, tmp_path: Path, columns: Any, option: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "a.parquet", **columns)
    assert main(["tokenize", str(table), "--model", str(model), *option]) == 1
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["status"] == "failed"
    assert reason in row["failed"]


def test_tables_as_hugging_face_writes_them(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A struct of bytes and a path; a path alone is not followed."""
    images = [{"bytes": picture(1), "path": "a.png"}, {"bytes": None, "path": "/etc/passwd"}, None]
    table = write_table(tmp_path / "a.parquet", image=images, label=[1, 2, 3])
    assert main(["tokenize", str(table), "--model", str(model)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["status"] for row in rows] == ["completed", "failed", "failed"]
    assert rows[1]["failed"] == rows[2]["failed"] == "no bytes"
