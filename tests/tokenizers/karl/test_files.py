"""Image files for the command line: what is planned, encoded and decoded, and how often."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.calibration import Calibration
from tokenthrift.karl.files import ImageFiles
from tokenthrift.karl.model import Karl
from tokenthrift.karl.verified import encode_verified, measure, verdict

KARL = tiny_karl(tiny_config(grid=(4, 4)), decisive=True)
IMAGES = pictures(4, (16, 16))


def files(*options: str, karl: Karl = KARL) -> ImageFiles:
    parser = argparse.ArgumentParser()
    ImageFiles.add_options(parser)
    return ImageFiles(karl, parser.parse_args(options))


@pytest.mark.parametrize("options", [(), ("--verify",)])
def test_every_image_is_decoded_as_often_as_is_said(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification has measured the error already."""
    decoded: list[int] = []
    decode = Karl.decode

    def spy(self: Karl, tokens: object, size: tuple[int, int] | None = None) -> Tensor:
        made: Tensor = decode(self, tokens, size)  # type: ignore[arg-type]
        decoded.append(len(made))
        return made

    monkeypatch.setattr(Karl, "decode", spy)
    rows = files(*options).tokenize(list(IMAGES), TokenBudget(target_error=0.2))
    assert sum(decoded) == sum(row.get("decoder_passes", 1) for row in rows)


def test_verified_rows_are_what_verification_gives() -> None:
    budget = TokenBudget(target_error=measure(KARL, IMAGES, KARL.encode(IMAGES)).median().item())
    rows = files("--verify").tokenize(list(IMAGES), budget)
    usage = encode_verified(KARL, IMAGES, budget).usage
    assert [row["tokens"] for row in rows] == [one.used for one in usage]
    assert [row["error"] for row in rows] == pytest.approx([one.error for one in usage], abs=1e-6)
    assert [row["result"] for row in rows] == [verdict(one, budget) for one in usage]
    assert len({row["result"] for row in rows}) == 2


def test_errors_and_bits_are_those_of_the_tokens() -> None:
    rows = files("--codes").tokenize(list(IMAGES), TokenBudget(max_tokens=5))
    tokens = KARL.encode(IMAGES, 5)
    assert [row["error"] for row in rows] == pytest.approx(measure(KARL, IMAGES, tokens).tolist(), abs=1e-6)
    assert tokens.codes is not None
    assert [row["codes"] for row in rows] == tokens.codes.tolist()
    assert {row["bits"] for row in rows} == {BitFormat.of(KARL.config).string_bits([5])}
    assert all("positions" not in row and "result" not in row for row in rows)
    full = tiny_karl(tiny_config(grid=(4, 4), latent_attention="full", halting="subset"))
    (row, *_) = files("--codes", karl=full).tokenize(list(IMAGES), TokenBudget(max_tokens=3))
    assert row["positions"] == full.encode(IMAGES, 3).positions[0].tolist()


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with torch.device("meta"):
        weightless = Karl(KARL.config)
    usage = files(karl=weightless).plan(tmp_path / "a.png", TokenBudget(retention=0.5))
    assert (usage.native, usage.cap) == (TOKENS, TOKENS // 2)
    layout = BitFormat.of(KARL.config)
    bits = layout.string_bits([3])
    limited = files("--max-bits", str(bits), karl=weightless)
    assert limited.plan(tmp_path / "a.png", TokenBudget()).cap == layout.tokens_within(bits) < TOKENS
    assert limited.plan(tmp_path / "a.png", TokenBudget(max_tokens=2)).cap == 2
    with pytest.raises(BudgetError, match="bits of continuous tokens"):
        files("--max-bits", "99", karl=tiny_karl(tiny_config(codebook_size=None, grid=(4, 4)))).plan(
            tmp_path / "a.png", TokenBudget()
        )


def test_calibrated_files() -> None:
    calibration = Calibration(alpha=0.1, images=50, tokens=TOKENS, requests=(0.02, 0.1), bounds=(0.05, 0.3))
    karl = tiny_karl(tiny_config(grid=(4, 4), calibration=calibration), decisive=True)
    rows = files("--calibrated", karl=karl).tokenize(list(IMAGES), TokenBudget(target_error=0.2))
    assert [row["tokens"] for row in rows] == [usage.used for usage in karl.encode(IMAGES, "e0.02").usage]


def test_images_that_are_not_square_are_not_read() -> None:
    with pytest.raises(ValueError, match="read as squares"):
        files(karl=tiny_karl())
