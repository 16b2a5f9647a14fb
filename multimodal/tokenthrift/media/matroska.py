"""What the elements of a Matroska or WebM file say, without decoding a frame: start, rotation, a missing end, damage.

FFmpeg goes on reading behind damage without a word, so that a hole looks like a pause; the structure tells them apart.
Elements are an identifier, a size and a content (RFC 8794, section 3); their names are those of RFC 9559, section 5.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

__all__ = ["display_rotation", "first_damage", "first_stamp", "stated_size"]

_SEGMENT, _CLUSTER, _TRACKS, _TRACK = 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE
_TYPE, _VIDEO, _PROJECTION, _ROLL = 0x83, 0xE0, 0x7670, 0x7675
_INFO, _SCALE, _NUMBER, _TIMESTAMP = 0x1549A966, 0x2AD7B1, 0xD7, 0xE7
_SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
# What may stand in a segment and in a cluster; anything else there is damage.
_IN_SEGMENT: Final = frozenset(
    (0x114D9B74, _INFO, _TRACKS, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367, _CLUSTER, 0xEC, 0xBF)
)
_IN_CLUSTER: Final = frozenset((_TIMESTAMP, _SIMPLE_BLOCK, _BLOCK_GROUP, 0xA7, 0xAB, 0x5854, 0xAF, 0xEC, 0xBF))
_MOST_ELEMENTS: Final = 20_000_000


class _Element(NamedTuple):
    """An element's identifier, the place of its content, and the end, None where it is not stated."""

    name: int
    content: int
    end: int | None


def stated_size(path: Path) -> int:
    """Bytes that the file has by the size of its segment; more than there are where its end is missing."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for element in _elements(file, 0, size):
            if element.name == _SEGMENT:
                return size if element.end is None else max(size, element.end)
    return size


def display_rotation(path: Path) -> int:
    """Degrees, counter-clockwise, by which the first picture track is to be turned: 0, 90, 180 or 270."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for track in _find(file, 0, size, _SEGMENT, _TRACKS, _TRACK):
            kind = next(_find(file, *track, _TYPE), None)
            if kind is None or _content(file, *kind) != b"\1":
                continue
            roll = next(_find(file, *track, _VIDEO, _PROJECTION, _ROLL), None)
            raw = b"" if roll is None else _content(file, *roll)
            if len(raw) not in (4, 8):
                return 0
            (degrees,) = struct.unpack(">f" if len(raw) == 4 else ">d", raw)
            return round(degrees / 90) * 90 % 360 if abs(degrees) <= 360 else 0
    return 0


def first_stamp(path: Path) -> Fraction | None:
    """Seconds at which the first block of pictures or sound stands; None where the first cluster holds none."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        scale = next(_find(file, 0, size, _SEGMENT, _INFO, _SCALE), None)
        tick = Fraction(1_000_000 if scale is None else _number(file, *scale), 1_000_000_000)
        tracks = set()
        for track in _find(file, 0, size, _SEGMENT, _TRACKS, _TRACK):
            kind, number = (next(_find(file, *track, name), None) for name in (_TYPE, _NUMBER))
            if kind is not None and number is not None and _number(file, *kind) in (1, 2):
                tracks.add(_number(file, *number))
        segment = next((e for e in _elements(file, 0, size) if e.name == _SEGMENT), None)
        inside = () if segment is None else _elements(file, segment.content, size)
        cluster = next((e for e in inside if e.name == _CLUSTER), None)
        ticks = None if cluster is None else _first_ticks(file, cluster.content, min(size, cluster.end or size), tracks)
        return None if ticks is None else tick * ticks


def _first_ticks(file: BinaryIO, start: int, end: int, tracks: Container[int]) -> int | None:
    """When the first block of one of the tracks in the content of a cluster is shown."""
    begins = 0
    for name, content, stop in _elements(file, start, end):
        block = content, stop or end
        if name == _TIMESTAMP:
            begins = _number(file, *block)
        if name == _BLOCK_GROUP:
            block = next(_find(file, *block, _BLOCK), (end, end))
        elif name != _SIMPLE_BLOCK:
            continue
        # A block is the number of its track, two bytes of ticks since the cluster began, and the rest.
        head = _content(file, *block)
        width = 9 - head[0].bit_length() if head and head[0] else 9
        if len(head) >= width + 2 and int.from_bytes(head[:width], "big") ^ 1 << 7 * width in tracks:
            return begins + int.from_bytes(head[width : width + 2], "big", signed=True)
    return None


def first_damage(path: Path) -> int | None:
    """Place of the first byte that is no element where one must stand; None in a sound file.

    Reads the head of every block, so it is for files that are under suspicion.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        at, end = 0, size
        for _ in range(_MOST_ELEMENTS):
            if at >= end:
                return None
            element = _element(file, at)
            if element is None:
                return at
            if element.name in (_SEGMENT, _CLUSTER):
                at = element.content
            elif element.end is None or element.end > size:
                return at
            elif element.name in _IN_SEGMENT or element.name in _IN_CLUSTER or at == 0:
                at = element.end
            else:
                return at
    return None


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[_Element]:
    while start < end and (element := _element(file, start)) is not None:
        yield element
        if element.end is None:
            return
        start = element.end


def _find(file: BinaryIO, start: int, end: int, *names: int) -> Iterator[tuple[int, int]]:
    """Start and end of the content of every element that the path of names leads to; clusters end the search."""
    for element in _elements(file, start, end):
        if element.name == _CLUSTER:
            return
        if element.name == names[0]:
            stop = min(end if element.end is None else element.end, end)
            if len(names) == 1:
                yield element.content, stop
            else:
                yield from _find(file, element.content, stop, *names[1:])


def _element(file: BinaryIO, at: int) -> _Element | None:
    """The element at a place; None where there is none."""
    file.seek(at)
    head = file.read(12)
    # The number of leading zero bits tells how many bytes follow; the identifier keeps its marker bit, the size not.
    width = 9 - head[0].bit_length() if head and head[0] else 9
    if width > 4 or len(head) <= width or not head[width]:
        return None
    length = 9 - head[width].bit_length()
    raw = int.from_bytes(head[width : width + length], "big")
    size = raw & ((1 << 7 * length) - 1)
    content = at + width + length
    unknown = size == (1 << 7 * length) - 1
    return _Element(int.from_bytes(head[:width], "big"), content, None if unknown else content + size)


def _number(file: BinaryIO, start: int, end: int) -> int:
    return int.from_bytes(_content(file, start, end), "big")


def _content(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(max(0, min(end - start, 8)))
