"""Shards of strangers: nothing is written elsewhere, nothing is allocated without limit, and every fault has a row."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import pytest

from tokenthrift.shards import items, table
from tokenthrift.shards.items import Item, ItemError
from tokenthrift.shards.table import table_items
from tokenthrift.shards.tar import tar_items
from tokenthrift.shards.units import units_of
from tokenthrift.shards.writing import to_webdataset

SUFFIXES = (".png",)


def found(given: Any, folder: Path) -> list[tuple[str | None, bytes | str]]:
    """Names with the bytes, or the reason why there are none."""
    rows: list[tuple[str | None, bytes | str]] = []
    for item in given:
        assert isinstance(item, Item)
        try:
            rows.append((item.name, item.fetch(folder).read_bytes()))
        except ItemError as error:
            rows.append((item.name, error.reason))
    return rows


def member(name: str, data: bytes = b"ok", **changes: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024


def read_tar(tmp_path: Path, *parts: bytes) -> list[tuple[str | None, bytes | str]]:
    (tmp_path / "spool").mkdir(exist_ok=True)
    path = tmp_path / "in.tar"
    path.write_bytes(b"".join(parts))
    rows = found(tar_items(path, SUFFIXES), tmp_path / "spool")
    assert {p.name for p in tmp_path.rglob("*")} <= {"in.tar", "spool", "item.png", "item.PNG"}, "written elsewhere"
    return rows


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "x/../../a.png", "x//a.png", "C:a.png", "x\\..\\a.png", "x\na.png"]
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    bad, good = read_tar(tmp_path, member(name), member("b.png"), END)
    assert bad == (None, "its name would lead out of the shard")
    assert good == ("b.png", b"ok")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    link = member("a.png", b"", type=kind, linkname="/etc/passwd")
    rows = read_tar(tmp_path, link, member("b.png"), END)
    assert rows == [("a.png", "a link or a device, not a file"), ("b.png", b"ok")]


def lying(size: int) -> bytes:
    """A header that states a size which is not there, in base 256 where it must."""
    info = tarfile.TarInfo("lie.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + b"few"


@pytest.mark.parametrize("size", [4096, 1 << 33, 1 << 62, 1 << 80, -512, -(1 << 40)])
def test_sizes_that_lie(tmp_path: Path, size: int) -> None:
    tracemalloc.start()
    rows = read_tar(tmp_path, member("a.png"), lying(size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[0] == ("a.png", b"ok")
    assert all(isinstance(reason, str) for _, reason in rows[1:])
    assert any("cut short" in str(reason) or "damaged" in str(reason) for _, reason in rows[1:])
    assert peak < 8 << 20


def test_headers_are_bounded(tmp_path: Path) -> None:
    """Long names and extended headers of gigabytes, in endless chains, and with sizes that are no numbers."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
        for size in (1 << 30, 1 << 70):
            rows = read_tar(tmp_path, member("a.png"), member("x", b"", type=kind, size=size), member("b.png"), END)
            assert rows[0] == ("a.png", b"ok")
            assert "the rest is lost" in str(rows[-1][1])
    pax = member("x", b"12 path=y.p\n", type=tarfile.XHDTYPE)
    rows = read_tar(tmp_path, member("a.png"), pax * 5000, member("b.png"), END)
    assert rows[0] == ("a.png", b"ok")
    for text in (b"size=-1000", b"size=" + b"9" * 5000, b"GNU.sparse.major=1", b"GNU.sparse.map=1,x", b"mtime=x"):
        line = b" %s\n" % text
        head = str(len(line) + len(str(len(line) + 4))).encode() + line
        rows = read_tar(tmp_path, member("a.png"), member("x", head, type=tarfile.XHDTYPE), member("b.png"), END)
        assert rows[0] == ("a.png", b"ok")
        assert len(rows) < 5


def test_damage_never_passes_in_silence(tmp_path: Path) -> None:
    whole = b"".join(member(f"{i}.png", bytes([i]) * 700) for i in range(4)) + END
    assert [name for name, _ in read_tar(tmp_path, whole)] == ["0.png", "1.png", "2.png", "3.png"]
    for cut in (1, 300, 512, 1000, 1536, 2000, 3072, 5000):
        rows = read_tar(tmp_path, whole[:cut])
        assert "cut short" in str(rows[-1][1]) or "damaged" in str(rows[-1][1]), cut
    broken = bytearray(whole)
    broken[1536 : 1536 + 100] = b"\xff" * 100
    rows = read_tar(tmp_path, bytes(broken))
    assert rows[0][0] == "0.png"
    assert "damaged at byte 1536" in str(rows[-1][1])
    assert "behind the end mark" in str(read_tar(tmp_path, whole, whole)[-1][1])
    assert "gzip" in str(read_tar(tmp_path, b"\x1f\x8b" + b"\0" * 600)[-1][1])
    for text in (b"", b"hello", b"\xff" * 2000):
        ((_, reason),) = read_tar(tmp_path, text)
        assert isinstance(reason, str)


def test_limits_of_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenthrift.shards import tar

    monkeypatch.setattr(tar, "MAX_ITEM_BYTES", 1000)
    rows = read_tar(tmp_path, member("a.png", b"x" * 1001), member("b.png"), END)
    assert rows == [("a.png", "1001 bytes, more than 1000"), ("b.png", b"ok")]


def test_noise_in_tars(tmp_path: Path) -> None:
    """Random damage: some rows or a reason, nothing else raised, nothing written elsewhere."""
    whole = b"".join(member(f"{i}.png", bytes([i]) * 700) for i in range(4)) + END
    draw = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        rows = read_tar(tmp_path, bytes(data[: draw.randint(1, len(data))]))
        assert rows


def test_our_own_tars_hold_no_hostile_names(tmp_path: Path) -> None:
    key_of = items.unique_keys()
    names = ["a.png", "A.png", "a.b.png", None, "x" * 5000 + ".png", "\udcff.png", ".png"]
    rows = [{"key": key_of(name, i)} for i, name in enumerate(names)]
    with tarfile.open(fileobj=io.BytesIO(to_webdataset(rows, {}))) as tar:
        written = tar.getnames()
    assert len({name.casefold() for name in written}) == len(names)
    assert all(len(name) < 250 and not name.startswith(("/", "..")) for name in written)


def read_table(path: Path, column: str | None = None) -> list[tuple[str | None, bytes | str]]:
    return found(table_items(path, ".png", column), path.parent)


def save(path: Path, values: Any, **options: Any) -> Path:
    pq.write_table(pyarrow.table({"image": values}), path, **options)
    return path


def test_pages_that_claim_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that unpack to as much as anybody likes."""
    bomb = save(tmp_path / "bomb.parquet", [b"\0" * (4 << 20), b"ok"], compression="zstd", use_dictionary=False)
    assert bomb.stat().st_size < 20_000
    assert [len(data) for _, data in read_table(bomb)] == [4 << 20, 2]
    monkeypatch.setattr(table, "MAX_PAGE_BYTES", 1 << 20)
    before = pyarrow.total_allocated_bytes()
    ((name, reason),) = read_table(bomb)
    assert name is None
    assert "a page that claims" in str(reason)
    assert pyarrow.total_allocated_bytes() - before < 1 << 20
    dictionary = save(tmp_path / "dictionary.parquet", [b"\0" * (2 << 20)], compression="zstd")
    assert "a page that claims" in str(read_table(dictionary)[0][1])


def test_one_long_value_in_many_rows(tmp_path: Path) -> None:
    """A dictionary names it once; spelled out it would be 4 GB."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), [b"\7" * (2 << 20)])
    path = save(tmp_path / "many.parquet", values, compression="zstd", dictionary_pagesize_limit=1 << 30)
    pool = pyarrow.default_memory_pool()
    before, peak, count = pool.bytes_allocated(), 0, 0
    for item in table_items(path, ".png"):
        assert item.error is None
        peak, count = max(peak, pool.bytes_allocated() - before), count + 1
    assert count == 2000
    assert peak < 64 << 20


def test_large_row_groups_are_read_in_parts(tmp_path: Path) -> None:
    values = [random.Random(i).randbytes(1 << 18) for i in range(160)]
    path = save(tmp_path / "large.parquet", values, row_group_size=160, use_dictionary=False, write_batch_size=4)
    del values
    pool = pyarrow.default_memory_pool()
    before, peak, count = pool.bytes_allocated(), 0, 0
    for item in table_items(path, ".png"):
        assert item.fetch(tmp_path).stat().st_size == 1 << 18
        peak, count = max(peak, pool.bytes_allocated() - before), count + 1
    assert count == 160
    assert peak < 24 << 20, f"{peak >> 20} MB of a row group of 40"


def test_noise_in_tables(tmp_path: Path) -> None:
    """Cut and damaged tables: the rows before, and then a reason."""
    whole = save(tmp_path / "whole.parquet", [b"abc", None, b"def" * 100], compression="snappy").read_bytes()
    draw, path = random.Random(0), tmp_path / "noise.parquet"
    cuts: list[Callable[[], bytes]] = [
        lambda: whole[: draw.randrange(len(whole))],
        lambda: whole[draw.randrange(9) :],
    ]

    def damaged() -> bytes:
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)

    for change in [*cuts * 20, *[damaged] * 120]:
        path.write_bytes(change())
        before = pyarrow.total_allocated_bytes()
        assert read_table(path)
        assert pyarrow.total_allocated_bytes() - before < 1 << 26


def test_output_names_of_inputs_never_collide(tmp_path: Path) -> None:
    from tokenthrift.media.files import FoundFile

    names = ["a.tar", "A.tar", "a~2.tar", "files.tar", "files.parquet", "sub/files.tar"]
    found_files = [FoundFile(Path(name), Path(name).with_suffix("")) for name in names]
    loose = [FoundFile(Path(f"{i}.png"), Path(str(i))) for i in range(5)]
    units = units_of([*found_files, *loose], 2)
    shards = [unit.shard(piece) for unit in units for piece in ((0,) if unit.loose else (0, 1, 2))]
    assert len({shard.casefold() for shard in shards}) == len(shards) == 6 * 3 + 3
