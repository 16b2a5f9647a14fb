"""Bytes against quality: every byte is counted, and the gallery and the curves are drawn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.karl.evaluation.rate_distortion import FORMATS, coded, format_points, karl_points

RECIPE = Path(__file__).resolve().parents[4] / "recipes" / "karl"


def bytes_of(count: int, size: tuple[int, int]) -> torch.Tensor:
    """Smooth images `(count, 3, H, W)` uint8."""
    return (torch.nn.functional.avg_pool2d(pictures(count, size), 5, 1, 2) * 255).to(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_counted_whole_and_is_nearer_at_a_higher_quality(name: str, tmp_path: Path) -> None:
    image = bytes_of(1, (32, 32))[0]
    small, rough = coded(image, name, 0)
    large, near = coded(image, name, 90)
    assert small < large
    assert (near.float() - image).abs().mean() < (rough.float() - image).abs().mean()
    path = tmp_path / f"image.{name.lower()}"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=0, **FORMATS[name])
    assert path.stat().st_size == small


def test_a_models_bytes_are_those_of_its_strings() -> None:
    karl, images = tiny_karl(decisive=True), bytes_of(3, (16, 24))
    points = list(karl_points(karl, images, [1, TOKENS]))
    for point, count in zip(points, (1, TOKENS), strict=True):
        tokens = karl.encode(images[:1].float() / 255, count)
        assert point.bytes == len(karl.to_bytes(tokens))
    made = torch.cat([karl.decode(karl.encode(image[None].float() / 255, TOKENS)) for image in images])
    l1 = (made.clamp(0, 1) - images.float() / 255).abs().mean().item()
    assert points[-1].l1 == pytest.approx(l1, abs=1e-5)
    assert points[-1].setting == f"{TOKENS} tokens"
    assert [point.way for point in format_points(images, (5,))] == list(FORMATS)


def test_the_recipe_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_karl(tiny_config(grid=(4, 4))).save_pretrained(tmp_path / "model")
    for name in ("photos", "emoji"):
        np.save(tmp_path / f"{name}.npy", bytes_of(3, (16, 16)).numpy())
    monkeypatch.syspath_prepend(str(RECIPE))
    script = importlib.import_module("rate_distortion")
    data = [f"{name}={tmp_path / name}.npy" for name in ("photos", "emoji")]
    arguments = [tmp_path / "model", "--data", *data, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["rate_distortion.py", *map(str, arguments)])
    script.main()
    report = (tmp_path / "out" / "report.md").read_text()
    assert "photos: bytes against quality" in report
    assert "| KARL | 8 tokens |" in report
    assert "| JPEG | quality 0 |" in report
    for figure in ("gallery", "rate_distortion"):
        assert Image.open(tmp_path / "out" / f"{figure}.png").size[0] > 300
