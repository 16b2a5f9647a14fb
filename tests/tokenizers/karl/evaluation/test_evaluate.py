"""Evaluation: metrics against known values, sweeps against encoding, complexity, sets of images, whole reports."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.cli import main
from tokenthrift.karl.calibration import fit
from tokenthrift.karl.evaluation import complexity
from tokenthrift.karl.evaluation.complexity import FAMILIES, jpeg_bytes, make, shuffled
from tokenthrift.karl.evaluation.image_sets import named_source, read_set
from tokenthrift.karl.evaluation.metrics import METRICS, gmsd, perceptual, psnr
from tokenthrift.karl.evaluation.sweeps import LADDER, calibrate, fewest, sweep
from tokenthrift.karl.evaluation.tables import misses_table
from tokenthrift.karl.evaluation.ways import Quality, equal_mean
from tokenthrift.karl.verified import measure
from tokenthrift.quality import read_quality


def test_metrics_of_known_pictures(tmp_path: Path) -> None:
    image = pictures(2, (32, 32))
    off = (image * 0.8 + 0.1).clamp(0, 1)
    assert METRICS["L1"](torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.25)).tolist() == [0.25]
    torch.testing.assert_close(psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)), torch.tensor([20.0]))
    for name, metric in {**METRICS, "GMSD": gmsd}.items():
        same, other = metric(image, image), metric(off, image)
        assert same.shape == other.shape == (2,)
        better = same > other if name in ("PSNR (dB)", "SSIM") else same < other
        assert better.all()
        torch.testing.assert_close(metric(off[1:], image[1:]), other[1:])  # a figure for each image
    name, metric = perceptual(tmp_path)
    assert "LPIPS" not in name.replace("no LPIPS", "")
    assert metric is gmsd


@pytest.mark.parametrize("nested", [True, False])
def test_sweeps_are_what_encoding_gives(nested: bool) -> None:
    config = tiny_config() if nested else tiny_config(latent_attention="full", halting="subset")
    karl = tiny_karl(config, decisive=True)
    shown = pictures(3)
    used, achieved, fixed = sweep(karl, shown, errors=(0.02, 0.1), counts=(2, TOKENS), batch=2)
    for i, budget in enumerate(("e0.02", "e0.1")):
        tokens = karl.encode(shown, budget)
        assert used[:, i].tolist() == [usage.used for usage in tokens.usage]
        torch.testing.assert_close(achieved[:, i], measure(karl, shown, tokens), atol=1e-5, rtol=0)
    for i, count in enumerate((2, TOKENS)):
        torch.testing.assert_close(fixed[:, i], measure(karl, shown, karl.encode(shown, count)), atol=1e-5, rtol=0)


def test_the_oracle_takes_the_fewest() -> None:
    errors = torch.tensor([[0.3, 0.1, 0.05], [0.3, 0.2, 0.2], [0.05, 0.3, 0.01]])
    assert fewest(errors, (4, 8, 16), 0.1).tolist() == [8, 16, 4]


def test_equal_means() -> None:
    counts = equal_mean(7.3, 10, 12)
    assert counts.double().mean() == 7.3
    assert set(counts.tolist()) == {7, 8}
    assert equal_mean(12.0, 5, 12).tolist() == [12] * 5


def test_families_differ_as_they_are_meant_to() -> None:
    bytes_of = {family: sum(jpeg_bytes(make(family, 4, 64))) / 4 for family in FAMILIES}
    assert bytes_of["flat"] < bytes_of["gradient"] < bytes_of["fractal"] < bytes_of["noise"]
    for family in FAMILIES:
        drawn = make(family, 3, 32)
        assert drawn.shape == (3, 3, 32, 32)
        assert 0 <= drawn.min() <= drawn.max() <= 1
        assert torch.equal(drawn, make(family, 3, 32))
    image = pictures(2, (32, 32))
    mixed = shuffled(image)
    assert not torch.equal(mixed, image)
    torch.testing.assert_close(mixed.flatten(2).sort().values, image.flatten(2).sort().values)


def test_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = (pictures(4, (16, 16)) * 255).round().to(torch.uint8)
    (tmp_path / "folder").mkdir()
    files = []
    for i, image in enumerate(shown):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(tmp_path / "folder" / f"{i}.png")
        file = io.BytesIO()
        picture.save(file, "PNG")  # the layout is called jpeg; any format is read
        files.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
    np.save(tmp_path / "a.npy", shown.numpy())
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "a.npz", jpeg=np.concatenate(files), offset=offset)
    lines = [json.dumps({"image": f"folder/{i}.png"}) for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    whole = read_set(tmp_path / "a.npy", 16)
    assert sorted(whole.flatten(1).sum(1).tolist()) == sorted(shown.flatten(1).sum(1).tolist())
    for source in ("folder", "a.npz", "a.jsonl"):
        assert torch.equal(read_set(tmp_path / source, 16), whole)
    assert torch.equal(read_set(tmp_path / "a.npy", 16, limit=2), whole[:2])
    (tmp_path / "folder" / "2.png").write_bytes(b"broken")
    assert len(read_set(tmp_path / "folder", 16)) == 3
    assert "left out" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"picture": "a.png"}\n')
    np.save(tmp_path / "b.npy", np.zeros(3))
    for source, reason in (("b.jsonl", "line 1"), ("b.npy", "uint8"), ("none", "no such"), ("a.txt", "no such")):
        with pytest.raises(ValueError, match=reason):
            read_set(tmp_path / source, 16)
    assert named_source("photos=x/y.npy") == ("photos", Path("x/y.npy"))
    assert named_source("x/y.npy") == ("y", Path("x/y.npy"))


def test_packed_files_are_read_as_carefully_as_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    good = file.getvalue()
    damaged = bytearray(good)
    damaged[damaged.index(b"IDAT") + 200] ^= 255
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    files = [good, bytes(damaged), b"", b"hello", bomb]
    offset = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "a.npz", jpeg=np.frombuffer(b"".join(files), dtype=np.uint8), offset=offset)
    assert len(read_set(tmp_path / "a.npz", 16)) == 1
    reports = capsys.readouterr().err
    for number, reason in ((1, "corrupt"), (2, "0 bytes"), (3, "not a picture"), (4, "pixels")):
        assert re.search(rf"a\.npz, image {number}: .*{reason}", reports)


def test_lpips_runs_where_the_images_are_and_is_given_its_own_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code gives it [0, 1]."""
    nets: list[Net] = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.seen: list[tuple[float, float]] = []
            nets.append(self)

        def forward(self, made: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            if not made.is_meta:
                self.seen += [(float(x.min()), float(x.max())) for x in (made, images)]
            return (self.weight * (made - images)).abs().mean((1, 2, 3), keepdim=True)

    class Metric:
        def __init__(self, net_type: str) -> None:
            self.net, self.net_type = Net(), net_type

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Metric)
    (tmp_path / "alexnet-owt-7be5be79.pth").touch()
    name, distance = perceptual(tmp_path)
    assert name == "LPIPS (alex)"
    assert distance(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).tolist() == [2.0, 2.0]
    assert nets[0].seen == [(-1, -1), (1, 1)]
    assert not nets[0].training
    # A device that every machine has, and on which weights from another one are refused.
    assert distance(torch.zeros(2, 3, 8, 8, device="meta"), torch.ones(2, 3, 8, 8, device="meta")).is_meta


def test_misses_are_counted_over_all_images() -> None:
    found = Quality(torch.tensor([2, 4, 6, 8]), {"L1": torch.tensor([0.1, 0.2, 0.3, 0.4])})
    sets = {"photos": torch.zeros(3), "emoji": torch.zeros(1)}
    table = misses_table(sets, found, 0.25, None, None, None)
    assert [row[:5] for row in table.rows] == [
        ("as it is", "photos", 0.25, 4.0, pytest.approx(1 / 3)),
        ("as it is", "emoji", 0.25, 8.0, 1.0),
        ("as it is", "all", 0.25, 5.0, 0.5),
    ]
    assert [row[-1] for row in table.rows] == [pytest.approx(x) for x in (0.05, 0.15, 0.1)]
    assert "Not calibrated" in table.note
    calibration = fit([[0.1, 0.3]] * 20, (0.02, 0.2), 0.1, 8)
    one = {"photos": torch.zeros(4)}
    table = misses_table(one, found, 0.25, calibration, 0.02, found)
    assert [row[:3] for row in table.rows] == [("as it is", "photos", 0.25), ("calibrated", "photos", 0.02)]
    assert "20 other images" in table.note
    assert len(misses_table(one, found, 0.05, calibration, None, None).rows) == 1


def test_calibration_of_a_model_is_saved_with_it(tmp_path: Path) -> None:
    karl = tiny_karl(decisive=True)
    coarse = calibrate(karl, pictures(30), 0.1)
    assert coarse.images == 30
    middle = (coarse.bounds[0] + coarse.bounds[-1]) / 2
    calibration = calibrate(karl, pictures(30), 0.1, targets=(middle,))
    assert len(calibration.requests) > len(coarse.requests)
    assert calibration.request(middle) >= coarse.request(middle)
    chosen = calibration.requests.index(calibration.request(middle))
    assert calibration.requests[chosen + 1] < 1.02 * calibration.requests[chosen], "few tokens are spent on a step"
    karl.config = replace(karl.config, calibration=calibration)
    karl.save_pretrained(tmp_path / "model")
    again = type(karl).from_pretrained(tmp_path / "model")
    assert again.config.calibration == calibration
    target = calibration.bounds[-1]
    missed = measure(karl, pictures(30), again.encode(pictures(30), f"e{target}", calibrated=True)) > target + 1e-6
    assert missed.sum() <= 3


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complexity, "IMAGES", 4)
    tiny_karl(tiny_config(grid=(4, 4)), decisive=True).save_pretrained(tmp_path / "model")
    for name, seed in (("test", 0), ("dev", 1)):
        shown = (pictures(12, (16, 16), seed) * 255).round().to(torch.uint8)
        np.save(tmp_path / f"{name}.npy", shown.numpy())
    arguments = ["evaluate", "karl", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    data = ["--data", f"noise={tmp_path}/test.npy", "--dev", f"noise={tmp_path}/dev.npy", "--error", "0.3"]
    assert main([*arguments, *data, "--images", "10"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["test"] == "noise: 10 images"
    curve = read_quality(tmp_path / "model")["image"]
    assert curve.tokens == tuple(range(1, TOKENS + 1))
    assert curve.command.startswith("tokenthrift evaluate karl --model")
    assert read_quality(tmp_path / "out") == {"image": curve}
    tables = {table["title"].split(":")[0]: table["rows"] for table in report["tables"]}
    ways = {row["way"]: row for row in next(rows for title, rows in tables.items() if title.startswith("At a"))}
    assert ways["fixed count, same mean"]["tokens"] == pytest.approx(ways["one pass"]["tokens"], abs=1 / 10)
    assert ways["all tokens"]["tokens"] == TOKENS
    assert 1 <= ways["one pass, verified"]["encoder passes"] <= 2, "tokens are nested"
    assert ways["one pass, verified"]["missed"] <= ways["one pass"]["missed"]
    compared = next(rows for title, rows in tables.items() if title.startswith("Adaptive against one count"))
    assert [row["conditioned on"] for row in compared] == [error for error in LADDER if 0.02 <= error <= 0.12]
    assert len(report["figures"]) == 5
    for name in report["figures"]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 100
    assert main([*arguments, "--data", f"a={tmp_path}/test.npy", "--dev", f"b={tmp_path}/dev.npy"]) == 1
    assert "name them alike" in capsys.readouterr().err


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_report_without_development_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool) -> None:
    """The calibration is then the model's own, if it has one."""
    monkeypatch.setattr(complexity, "IMAGES", 2)
    karl = tiny_karl(tiny_config(grid=(4, 4)), decisive=True)
    if calibrated:
        karl.config = replace(karl.config, calibration=fit([[0.1, 0.2]] * 20, (0.02, 0.1), 0.1, TOKENS))
    karl.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "test.npy", (pictures(8, (16, 16)) * 255).round().to(torch.uint8).numpy())
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--data", f"{tmp_path}/test.npy"]
    assert main(["evaluate", "karl", *arguments, "--error", "0.3"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["dev (calibration)"] == "none"
    rows = next(table["rows"] for table in report["tables"] if table["title"].startswith("At a target"))
    assert ("one pass, calibrated" in {row["way"] for row in rows}) is calibrated
