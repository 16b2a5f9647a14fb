"""Small files that claim, or really hold, very much: refused before anything of that size is allocated.

A file is read in a fork of this process, so that the peak of its memory can be measured apart.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.media_files import film, voice, write
from tokenthrift.media import video
from tokenthrift.media.audio import stream_audio
from tokenthrift.media.errors import MediaError
from tokenthrift.media.image import image_size, read_image
from tokenthrift.media.probe import probe
from tokenthrift.media.video import read_frames, read_frames_at, stream_frames

RATE = 16_000
MEGABYTE = 1 << 20

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")


def peak(read: Callable[[], object]) -> tuple[int, str]:
    """Megabytes by which `read` raised the peak of memory, and the reason of its error, if there was one."""
    into, out = os.pipe()
    child = os.fork()
    if not child:
        reason = "crashed"
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            try:
                read()
                reason = ""
            except MediaError as error:
                reason = error.reason
            os.write(out, f"{_status('VmHWM') - before} {reason}".encode())
        finally:
            os._exit(0)
    os.close(out)
    with os.fdopen(into) as pipe:
        megabytes, _, reason = pipe.read().partition(" ")
    os.waitpid(child, 0)
    return int(megabytes), reason


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024


def _png(path: Path, width: int, height: int, kind: int, rows: bytes, *behind: tuple[bytes, bytes]) -> Path:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 9))]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in (*chunks, *behind, (b"IEND", b"")):
        parts.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    path.write_bytes(b"".join(parts))
    return path


def _patched(path: Path, source: Path, *changes: tuple[int, bytes]) -> Path:
    data = bytearray(source.read_bytes())
    for at, value in changes:
        data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def _behind(source: Path, name: bytes) -> int:
    return source.read_bytes().index(name) + len(name)


@pytest.mark.parametrize("kind", ["png", "gif", "jpg", "tif"])
def test_a_picture_that_claims_too_much_is_refused_unread(kind: str, tmp_path: Path) -> None:
    plain = tmp_path / f"plain.{kind}"
    Image.new("RGB", (16, 16)).save(plain)
    if kind == "png":
        huge = _png(tmp_path / "huge.png", 60_000, 60_000, 2, bytes(100))
    elif kind == "gif":
        huge = _patched(tmp_path / "huge.gif", plain, (6, b"\xff\xff\xff\xff"))
    elif kind == "jpg":
        huge = _patched(tmp_path / "huge.jpg", plain, (_behind(plain, b"\xff\xc0") + 3, b"\xff\xdc\xff\xdc"))
    else:
        wide = plain.read_bytes().index(struct.pack("<HHI", 256, 4, 1))
        huge = _patched(tmp_path / "huge.tif", plain, (wide + 8, struct.pack("<I", 2**31 - 1)))
    for read in (image_size, read_image, probe):
        megabytes, reason = peak(lambda read=read: read(huge))  # type: ignore[misc]
        assert "too many pixels" in reason or "at most 100,000,000" in reason
        assert megabytes < 64


def test_the_size_of_a_picture_costs_no_memory_and_its_pixels_little_more_than_themselves(tmp_path: Path) -> None:
    """A bomb below the limit: 4,000,000 pixels in 16 kB, 16 MB as Pillow holds them and 48 MB as floats."""
    path = _png(tmp_path / "bomb.png", 2000, 2000, 6, bytes(2000 * 8_001))
    assert path.stat().st_size < 100_000
    assert peak(lambda: image_size(path))[0] < 8
    assert peak(lambda: read_image(path))[0] < 16 + 48 + 32


def test_the_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _png(tmp_path / "late.png", 4, 2, 2, bytes(2 * 13), (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    assert image_size(path) == (4, 2) == tuple(read_image(path).shape[1:])


def test_strips_give_what_the_whole_picture_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 23, 4), dtype=np.uint8)
    for name, mode in (("a.png", "RGBA"), ("b.png", "P"), ("c.png", "LA"), ("d.tif", "CMYK")):
        picture = Image.fromarray(noise).convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
        picture.save(tmp_path / name)
        whole = read_image(tmp_path / name)
        monkeypatch.setattr("tokenthrift.media.image._STRIP_PIXELS", 100)
        assert torch.equal(read_image(tmp_path / name), whole)
        monkeypatch.undo()


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    for read in (read_image, image_size):
        with pytest.raises(MediaError, match="EPS is a program"):
            read(path)


def _wav(path: Path, channels: int, rate: int) -> Path:
    plain = write(path.with_name("plain.wav"), voice(0.1))
    fields = struct.pack("<HII", channels, rate, min(2 * channels * rate, 2**32 - 1)) + struct.pack("<H", 2 * channels)
    return _patched(path, plain, (22, fields))


def test_a_recording_that_claims_too_much_is_refused_unread(tmp_path: Path) -> None:
    cases = {
        _wav(tmp_path / "channels.wav", 1024, 1_000_000): "1024 channels",
        _wav(tmp_path / "rate.wav", 1, 2**31 - 1): "rate|known format",
    }
    plain = write(tmp_path / "plain.flac", voice(0.1))
    most = bytes([plain.read_bytes()[21] | 15]) + b"\xff" * 4
    cases[_patched(tmp_path / "samples.flac", plain, (21, most))] = "corrupt|cut short"
    for path, message in cases.items():
        megabytes, reason = peak(lambda path=path: list(stream_audio(path)))  # type: ignore[misc]
        assert any(part in reason for part in message.split("|")), reason
        assert megabytes < 64


def test_a_length_that_the_bytes_cannot_hold_is_not_believed(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.flac", voice(0.1))
    most = bytes([plain.read_bytes()[21] | 15]) + b"\xff" * 4
    with pytest.raises(MediaError, match="claims 68,719,476,735 samples"):
        probe(_patched(tmp_path / "long.flac", plain, (21, most)))
    hour = tmp_path / "silence.flac"
    soundfile.write(hour, np.zeros(600 * RATE, np.int16), RATE)
    assert probe(hour).size.seconds == 600


def test_hours_of_silence_in_a_few_bytes_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "silence.flac"
    soundfile.write(path, np.zeros(900 * RATE, np.int16), RATE)
    assert path.stat().st_size < 50_000
    megabytes, reason = peak(lambda: sum(len(block) for block in stream_audio(path)))
    assert (megabytes < 24, reason) == (True, "")


def test_frames_that_claim_too_much_are_refused_undecoded(tmp_path: Path) -> None:
    plain = tmp_path / "plain.gif"
    Image.new("P", (16, 16)).save(plain, save_all=True, append_images=[Image.new("P", (16, 16), 1)])
    huge = _patched(tmp_path / "huge.gif", plain, (6, b"\xff\xff\xff\xff"))
    for read in (lambda: read_frames(huge, count=2), lambda: list(stream_frames(huge, size=(8, 8)))):
        megabytes, reason = peak(read)
        assert "corrupt" in reason or "known format" in reason
        assert megabytes < 64


def test_tables_that_claim_too_many_samples_cost_nothing(tmp_path: Path) -> None:
    plain = film(tmp_path / "plain.mp4", 8)
    many = struct.pack(">I", 2**30 - 1)
    for name, changes in {
        "stts": [(_behind(plain, b"stts") + 8, many)],
        "ctts": [(_behind(plain, b"ctts") + 8, many)],
        "elst": [(_behind(plain, b"elst") + 4, many)],
        "stsz": [(_behind(plain, b"stsz") + 4, b"\0\0\0\1" + many), (_behind(plain, b"stsc") + 12, many)],
    }.items():
        path = _patched(tmp_path / f"{name}.mp4", plain, *changes)
        assert peak(lambda path=path: read_frames(path, count=2))[0] < 64, name  # type: ignore[misc]


def test_more_frames_than_fit_are_refused_before_one_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "film.mp4", 30)
    monkeypatch.setattr(video, "MAX_BYTES", 10 * 3 * 64 * 48)
    monkeypatch.setattr(video, "_repeated", None)
    reads: list[Callable[[], object]] = [lambda: read_frames(path, count=11), lambda: read_frames_at(path, 25)]
    for read in reads:
        with pytest.raises(MediaError, match=r"frames of 64 x 48 take .* stream_frames"):
            read()
    monkeypatch.undo()
    monkeypatch.setattr(video, "MAX_BYTES", 10 * 3 * 64 * 48)
    assert len(read_frames(path, count=10).pixels) == 10
    assert len(read_frames_at(path, 25, size=(8, 8)).pixels) == 30


def test_lists_of_other_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.ts"
    with av.open(str(secret), "w") as out:
        stream: Any = out.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(25):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n"
    for name, text in (("a.m3u8", playlist), ("b.mp4", "ffconcat version 1.0\nfile secret.ts\n"), ("c.mp4", playlist)):
        path = tmp_path / name
        path.write_text(text)
        for read in (probe, lambda path: read_frames(path, count=1), lambda path: list(stream_audio(path))):
            with pytest.raises(MediaError, match="a list of other files"):
                read(path)
