"""A container opened with care, and the clock that all its tracks share.

Second 0 of a file is where its presentation starts: FFmpeg's start time, the earliest of all tracks, as a player counts
from there. Matroska states a start before zero only for the samples that an audio decoder drops (its codec delay), and
there second 0 is the zero of its timestamps. Sound, frames and lips are all counted from this one instant.

Nothing outside the file is opened: "file:" and the whitelist keep a hostile playlist or file name from a network
address, and a playlist, which names other files, is refused whatever its name. A picture of more than `MAX_PIXELS` is
not decoded even to find out what the file is. A file whose own structure says that it goes on behind its last byte is
refused as cut short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from tokenthrift import extras
from tokenthrift.media import matroska, mp4
from tokenthrift.media.errors import MediaError, cause, check_file

__all__ = ["LOST_SECONDS", "MAX_PIXELS", "display_rotation", "opened", "preferred", "start_of"]

LOST_SECONDS: Final = 0.5
"""Less than this may be missing of a whole file."""

MAX_PIXELS: Final = 100_000_000
"""Most pixels of a frame; a few bytes can claim many gigabytes."""

# What names other files: by its first bytes, before FFmpeg opens them, and by FFmpeg's name of the format.
_LISTS: Final = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<smil", b"[playlist]", b"[Reference]", b"v=0")
_LIST_FORMATS: Final = frozenset(("hls", "concat", "dash", "sdp", "rtsp", "image2", "imf", "webm_dash_manifest"))
_BOXES: Final = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")


@contextmanager
def opened(
    path: Path, error: type[MediaError], what: str, *, form: str | None = None, options: dict[str, str] | None = None
) -> Iterator[Any]:
    """The open container.

    Args:
        path: the file.
        error: what is raised about it.
        what: what the file should be, for the message.
        form: FFmpeg's name of the format, where the file does not tell.
        options: of that format.

    Raises:
        MediaError: of the type given: the file cannot be read, is of no known format, or is cut short.
        MissingExtraError: PyAV is not installed.
    """
    av = extras.require("av")
    check_file(path, error)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(64)
    except OSError as problem:
        raise error(path, f"cannot be read: {problem.strerror}") from problem
    if not size:
        raise error(path, "empty: a file of 0 bytes")
    if (stated := _stated_size(path, magic)) > size:
        raise error(path, f"cut short: {size} bytes of {stated}")
    if form is None and magic.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_LISTS):
        raise error(path, f"not {what}: a list of other files; name those")
    options = {"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "file", **(options or {})}
    # Before version 18 options for streams too end the process (PyAV issue 2010) where probing finds streams that no
    # header names, as in FLV and MPEG; a picture's size is then checked only before it is decoded for us.
    # Version 19 decodes titles when they are read, and takes no word about those that are not UTF-8.
    version = int(av.__version__.partition(".")[0])
    given: dict[str, Any] = {"options" if version >= 18 else "container_options": options}
    if version < 19:
        given["metadata_errors"] = "replace"
    try:
        container = av.open(f"file:{path}", format=form, **given)
    except Exception as problem:  # On random bytes PyAV also raises ZeroDivisionError and EOFError.
        raise error(path, f"not {what} of a known format, or damaged: {cause(problem)}") from problem
    with container:
        if _LIST_FORMATS.intersection(container.format.name.split(",")):
            raise error(path, f"not {what}: a list of other files; name those")
        yield container


def start_of(path: Path, container: Any) -> Fraction:
    """Second 0 of the file, in seconds of its timestamps."""
    start = Fraction(container.start_time or 0, 1_000_000)
    if "matroska" not in container.format.name:
        return start
    # FFmpeg's start leaves out the pictures of a film that has very few of them.
    first = matroska.first_stamp(path) if start > 0 else None
    return max(start if first is None else min(start, first), Fraction(0))


def preferred(streams: Sequence[Any]) -> Any:
    """The track that a player takes: the first that is marked as default, else the first."""
    default = extras.require("av").stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), streams[0])


def display_rotation(path: Path, format_name: str) -> int:
    """Degrees, counter-clockwise, by which the pictures are to be turned."""
    if "mp4" in format_name:
        return mp4.display_rotation(path)
    return matroska.display_rotation(path) if "matroska" in format_name else 0


def _stated_size(path: Path, magic: bytes) -> int:
    """Bytes that the file should have by its own structure; 0 where that tells nothing."""
    if magic[4:8] in _BOXES:
        return mp4.stated_size(path)
    if magic[:4] == b"\x1aE\xdf\xa3":
        return matroska.stated_size(path)
    # The first chunk of an AVI states its length, rounded up to even; when it was cut, FFmpeg only shortens the index.
    if magic[:4] == b"RIFF" and magic[8:12] == b"AVI ":
        return int.from_bytes(magic[4:8], "little") + 7
    return 0
