"""Bad input raises before anything is computed, and says what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokenizers.karl.tiny_karl import pictures, released_config, tiny_config, tiny_karl
from tokenthrift.karl.inputs import grid_of
from tokenthrift.tokens import TokenBatch

MODEL = tiny_karl()
IMAGES = pictures(2)


def with_value(value: float) -> Tensor:
    images = IMAGES.clone()
    images[1, 0, 3, 3] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (IMAGES[0], ValueError, r"must be \(B, 3, H, W\), not \(3, 16, 24\); one image is images\[None\]"),
        (IMAGES.permute(0, 2, 3, 1), ValueError, r"not \(2, 16, 24, 3\); channels come second"),
        (IMAGES[:, :1], ValueError, r"not \(2, 1, 16, 24\); make it RGB"),
        (IMAGES[:0], ValueError, "no images"),
        ((IMAGES * 255).byte(), TypeError, r"torch.uint8; bytes are images / 255"),
        (IMAGES.numpy(), TypeError, "must be a tensor .* not ndarray"),
        (IMAGES * 255, ValueError, r"image 0 must be in \[0, 1\], found .*; perhaps images / 255"),
        (IMAGES * 2 - 1, ValueError, r"image 0 must be in \[0, 1\], found -.*; perhaps \(images \+ 1\) / 2"),
        (with_value(1.01), ValueError, r"image 1 must be in \[0, 1\], found .* to 1.01; perhaps images.clamp"),
        (with_value(float("nan")), ValueError, "image 1 holds NaN"),
        (with_value(float("inf")), ValueError, "image 1 holds NaN or infinite"),
        (IMAGES[..., :22], ValueError, "multiples of 4 pixels, not 16 x 22; the nearest is 16 x 24"),
        (IMAGES[..., :3, :], ValueError, "multiples of 4 pixels, not 3 x 24; the nearest is 4 x 24"),
    ],
)
def test_images(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODEL.encode(images)


def test_grids() -> None:
    assert grid_of((40, 8), tiny_config()) == (10, 2)
    with pytest.raises(ValueError, match="grid of 4160 cells, at most 4096"):
        grid_of((260, 256), tiny_config())
    with pytest.raises(ValueError, match="takes 16 x 24 pixels, not 24 x 16"):
        grid_of((24, 16), released_config())


def test_the_memory_layout_and_precision_of_images_do_not_matter() -> None:
    expected = MODEL.encode(IMAGES).embeddings
    assert torch.equal(MODEL.encode(IMAGES.contiguous(memory_format=torch.channels_last)).embeddings, expected)
    assert torch.equal(MODEL.encode(IMAGES.double()).embeddings, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"embeddings": t.embeddings[..., :8]}, "must have 12 numbers each, not 8"),
        (lambda t: {"positions": t.positions + 9}, "from 0 to 11, found 9 to 12"),
        (lambda t: {"positions": t.positions - 1}, "from 0 to 11, found -1 to 2"),
        (lambda t: {"positions": t.positions * 0}, "same position"),
        (lambda t: {"embeddings": t.embeddings / 0}, "NaN or infinite"),
    ],
)
def test_tokens(change: Callable[[TokenBatch], dict[str, Any]], message: str) -> None:
    tokens = MODEL.encode(IMAGES, 4)
    with pytest.raises(ValueError, match=message):
        MODEL.decode(replace(tokens, **change(tokens)))


def test_sizes_to_decode_to() -> None:
    tokens = MODEL.encode(pictures(2, (8, 32)), 4)
    assert MODEL.decode(tokens, (8, 32)).shape == (2, 3, 8, 32)
    with pytest.raises(ValueError, match="multiples of 4 pixels, not 8 x 30"):
        MODEL.decode(tokens, (8, 30))


def test_codes() -> None:
    for codes, positions, message in (
        ([[0, 32]], None, "from 0 to 31, found 32"),
        ([[-1]], None, "from 0 to 31, found -1"),
        ([[1, 2]], [[0]], "one position for each code"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL.from_codes(codes, positions)
    with pytest.raises(ValueError, match="continuous tokens and no codes"):
        tiny_karl(tiny_config(codebook_size=None)).from_codes([[1]])
