"""What the boxes of an MP4 or QuickTime file say, without decoding a frame: the display rotation, and a missing end.

PyAV tells the rotation of a decoded frame only. The boxes on the way are `moov`, `trak` and in it `tkhd`, which holds
the matrix, and `mdia`/`hdlr`, which says that the track is one of pictures (ISO/IEC 14496-12, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

__all__ = ["display_rotation", "stated_size"]

# The matrix of `tkhd` stands behind its version, flags and times: 40 bytes, or 52 where times take eight.
_MATRIX_AT: Final = {0: 40, 1: 52}
# More boxes than this on one level are no film; a hostile file holds millions of 8 bytes.
_MOST_BOXES: Final = 100_000


def display_rotation(path: Path) -> int:
    """Degrees, counter-clockwise, by which the first picture track is to be turned: 0, 90, 180 or 270.

    A file without such boxes, or with broken ones, is not turned; that the file is sound is for the demuxer to say.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for track in _find(file, 0, size, b"moov", b"trak"):
            handler = next(_find(file, *track, b"mdia", b"hdlr"), None)
            header = next(_find(file, *track, b"tkhd"), None)
            if handler and header and _read(file, handler[0] + 8, 4) == b"vide":
                start = header[0] + _MATRIX_AT.get(_read(file, header[0], 1)[0], 40)
                a, b = (int.from_bytes(_read(file, start + at, 4), "big", signed=True) for at in (0, 4))
                return round(-math.degrees(math.atan2(b, a)) / 90) * 90 % 360
    return 0


def stated_size(path: Path) -> int:
    """Bytes that the file has by its outermost boxes; more than there are where its end is missing.

    A fragmented file (`moof`) is written so that it can be read up to where it ends, and states what it has.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        at = 0
        for _ in range(_MOST_BOXES):
            if at + 8 > size:
                break
            head = _read(file, at, 16)
            length, name = int.from_bytes(head[:4], "big"), head[4:8]
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            # What stands behind the last box of an intact file (padding, a note) is nobody's promise.
            if name == b"moof" or length < 8 or (at + length > size and name not in (b"mdat", b"moov")):
                return size
            at += length
    return max(at, size)


def _find(file: BinaryIO, start: int, end: int, *names: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the content of every box that the path of names leads to."""
    for _ in range(_MOST_BOXES):
        if start + 8 > end:
            return
        head = _read(file, start, 16)
        length, name, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if length == 1:
            length, content = int.from_bytes(head[8:], "big"), start + 16
        stop = min(start + length if length else end, end)
        if stop < content:
            return
        if name == names[0]:
            if len(names) == 1:
                yield content, stop
            else:
                yield from _find(file, content, stop, *names[1:])
        start = stop


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count).ljust(count, b"\0")
