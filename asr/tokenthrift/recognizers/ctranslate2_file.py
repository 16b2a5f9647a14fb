"""What a file of CTranslate2 (`model.bin`) holds, read before its own C++ reader sees the file.

Source: the writer of CTranslate2's `specs/model_spec.py` (binary version 6): the name of the network, then for each
tensor its name, shape, type and bytes, then other names of the same tensors. CTranslate2 believes the lengths it
finds; here all of them are checked against each other and against the size of the file, and no tensor is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from tokenthrift.sources import WeightsError

__all__ = ["ModelFile", "read_model_file"]

_VERSIONS: Final = (5, 6)
_ITEM_BYTES: Final = (4, 1, 2, 4, 2, 2)  # float32, int8, int16, int32, float16, bfloat16
_WHOLE: Final = {1: "<b", 2: "<h", 3: "<i"}
_MOST_TENSORS: Final = 100_000
_MOST_AXES: Final = 5


@dataclass(frozen=True, slots=True)
class ModelFile:
    """Names of the file.

    Attributes:
        network: "WhisperSpec" for a Whisper.
        shapes: of its tensors.
        numbers: the whole numbers among them, such as counts of heads.
    """

    network: str
    shapes: dict[str, tuple[int, ...]]
    numbers: dict[str, int]


def read_model_file(path: Path) -> ModelFile:
    """Reads all but the tensors.

    Raises:
        WeightsError: the file is cut off, of another version, or says something of itself that is not so.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            version = _number(file, "<I")
            if version not in _VERSIONS:
                raise ValueError(f"version {version} of the format; {_VERSIONS[0]} and {_VERSIONS[-1]} are read")
            network = _text(file)
            _number(file, "<I")
            count = _number(file, "<I")
            if count > _MOST_TENSORS:
                raise ValueError(f"{count} tensors")
            shapes: dict[str, tuple[int, ...]] = {}
            numbers: dict[str, int] = {}
            for _ in range(count):
                _tensor(file, size, shapes, numbers)
            aliases = _number(file, "<I")
            if aliases > _MOST_TENSORS:
                raise ValueError(f"{aliases} other names")
            for _ in range(aliases):
                name, target = _text(file), _text(file)
                if target not in shapes:
                    raise ValueError(f"{name} stands for {target}, which is not there")
                shapes[name] = shapes[target]
            if file.tell() != size:
                raise ValueError(f"{size - file.tell()} bytes more than it says")
        except (ValueError, struct.error) as error:
            raise WeightsError(f"{path}: no file of CTranslate2, or a damaged one: {error}") from error
    return ModelFile(network, shapes, numbers)


def _number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(kind, file.read(struct.calcsize(kind)))[0])


def _text(file: BinaryIO) -> str:
    data = file.read(_number(file, "<H"))
    if data[-1:] != b"\0":
        raise ValueError("a name without an end")
    return data[:-1].decode()


def _tensor(file: BinaryIO, size: int, shapes: dict[str, tuple[int, ...]], numbers: dict[str, int]) -> None:
    name, axes = _text(file), _number(file, "<B")
    if axes > _MOST_AXES:
        raise ValueError(f"{name} has {axes} axes")
    shape = tuple(_number(file, "<I") for _ in range(axes))
    kind, stated = _number(file, "<B"), _number(file, "<I")
    if kind >= len(_ITEM_BYTES) or stated != prod(shape) * _ITEM_BYTES[kind]:
        raise ValueError(f"{name} of shape {list(shape)} and type {kind} has {stated} bytes")
    if stated > size - file.tell():
        raise ValueError(f"{name} reaches beyond the end")
    shapes[name] = shape
    if not shape and kind in _WHOLE:
        numbers[name] = _number(file, _WHOLE[kind])
    else:
        file.seek(stated, 1)
