"""What a file is, by its first bytes: for folders whose files have other suffixes, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias

__all__ = ["Kind", "kind_of"]

Kind: TypeAlias = Literal["picture", "sound", "film", "animation"]
"""A film is a container that may hold pictures, sound or both; an animation is a picture and a film."""

_STARTS: Final[tuple[tuple[bytes, Kind], ...]] = (
    (b"\x89PNG\r\n\x1a\n", "picture"),
    (b"\xff\xd8\xff", "picture"),
    (b"GIF8", "animation"),
    (b"BM", "picture"),
    (b"II*\0", "picture"),
    (b"MM\0*", "picture"),
    (b"II+\0", "picture"),
    (b"\0\0\0\x0cjP  ", "picture"),
    (b"fLaC", "sound"),
    (b"ID3", "sound"),
    (b"caff", "sound"),
    (b".snd", "sound"),
    (b"RF64", "sound"),
    (b"riff", "sound"),
    (b"wvpk", "sound"),
    (b"MAC ", "sound"),
    (b"TTA1", "sound"),
    (b"#!AMR", "sound"),
    (b"NIST_1A", "sound"),
    (b"\x0b\x77", "sound"),
    (b"OggS", "film"),
    (b"\x1aE\xdf\xa3", "film"),
    (b"FLV\x01", "film"),
    (b"0&\xb2u\x8ef\xcf\x11", "film"),
    (b".RMF", "film"),
    (b"\0\0\1\xba", "film"),
    (b"\0\0\1\xb3", "film"),
    (b"YUV4MPEG2", "film"),
    (b"DKIF", "film"),
)
_RIFF: Final[dict[bytes, Kind]] = {b"WAVE": "sound", b"AVI ": "film", b"WEBP": "picture"}
_STILL_BRANDS: Final = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


def kind_of(path: Path) -> Kind | None:
    """What a file is, None where that is not known or it cannot be read."""
    if not path.is_file():
        return None  # A pipe would be waited for.
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return None
    if head[:4] in (b"RIFF", b"RIFX", b"FORM"):
        return "sound" if head[8:11] == b"AIF" else _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return "picture" if head[8:12] in _STILL_BRANDS else "film"
    if head[4:8] in (b"moov", b"mdat", b"wide") or (len(head) > 376 and head[0] == head[188] == head[376] == 0x47):
        return "film"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    # MPEG audio without a tag: eleven bits set, and a layer, rate and frequency that exist; ADTS has layer 0.
    if len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x18 != 8:
        return "sound" if head[2] >> 4 < 15 and head[2] & 12 != 12 else None
    return None
