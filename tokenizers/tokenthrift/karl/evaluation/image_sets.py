"""Sets of images to evaluate a model on, from whatever they are kept in.

A set is a folder of image files, an array as training reads it (`.npy`, uint8 `(N, 3, H, W)`), a packed set of files
(`.npz` with the bytes of all `jpeg` files and the `offset` where each starts), or a manifest: a JSON object a line,
with the path of an `image` relative to the manifest. A file that cannot be read is reported and left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenthrift.media.files import find_files
from tokenthrift.media.image import ImageError, read_image, read_image_bytes, square
from tokenthrift.media.suffixes import IMAGE_SUFFIXES

__all__ = ["named_source", "read_set"]


def named_source(text: str) -> tuple[str, Path]:
    """`photos=data/photos.npy` to its name and path; without a name, that of the file or folder."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals else (Path(text).stem, Path(text))


def read_set(source: Path, size: int, limit: int | None = None, seed: int = 0) -> Tensor:
    """Reads a set of images as middle squares.

    Args:
        source: folder, `.npy`, `.npz` or manifest.
        size: side of the result, in pixels.
        limit: most images, drawn at random; all if None.
        seed: of the draw.

    Returns:
        `(N, 3, size, size)` uint8.

    Raises:
        ValueError: the source is of no known kind, or holds no image that can be read.
    """
    readers = _readers(source)
    order = torch.randperm(len(readers), generator=torch.Generator().manual_seed(seed)).tolist()
    images: list[Tensor] = []
    for index in order:
        if limit is not None and len(images) == limit:
            break
        try:
            image = square(readers[index](), size)
        except ImageError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        images.append((image * 255).round().to(torch.uint8))
    if not images:
        raise ValueError(f"{source}: no image that can be read")
    return torch.stack(images)


def _readers(source: Path) -> list[Callable[[], Tensor]]:
    """A function for each image, that reads it."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_dir():
        found = find_files([str(source)], IMAGE_SUFFIXES, "image")
        if remark := found.remark("rename them to be read"):
            print(remark, file=sys.stderr)
        return [partial(read_image, file.path) for file in found]
    if source.suffix == ".npy":
        array: Any = np.load(source, mmap_mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3:
            raise ValueError(f"{source} holds {array.dtype} {array.shape}; uint8 (N, 3, height, width) is needed")
        return [partial(_from_array, array, index) for index in range(len(array))]
    if source.suffix == ".npz":
        data = np.load(source)
        if not {"jpeg", "offset"} <= set(data.files):
            raise ValueError(f"{source} holds {', '.join(data.files)}; jpeg and offset are needed")
        jpeg, offset = data["jpeg"], data["offset"]
        return [partial(_from_bytes, source, jpeg, offset, index) for index in range(len(offset) - 1)]
    if source.suffix in (".jsonl", ".json"):
        return [partial(read_image, path) for path in _manifest(source)]
    raise ValueError(f"{source}: not a folder, .npy, .npz or .jsonl manifest")


def _from_array(array: Any, index: int) -> Tensor:
    return torch.from_numpy(np.array(array[index])).float() / 255


def _from_bytes(source: Path, jpeg: Any, offset: Any, index: int) -> Tensor:
    return read_image_bytes(jpeg[offset[index] : offset[index + 1]].tobytes(), f"{source}, image {index}")


def _manifest(source: Path) -> Iterator[Path]:
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield source.parent / json.loads(line)["image"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{source}, line {number}: {{"image": "a.png"}} is needed, found {line[:80]!r}') from error
