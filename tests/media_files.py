"""Real media files for tests, written by libsndfile or by FFmpeg's encoders through PyAV.

Sound is a voice-like signal. Frames of a film carry their number as black and white blocks, which survive any codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

Samples = NDArray[np.float32]


def voice(seconds: float, rate: int = 16_000, pitch: float = 140.0, loudness: float = 0.3) -> Samples:
    """(samples,) float32: harmonics of a pitch in a rhythm of four syllables a second, with silence between them."""
    time = np.arange(round(seconds * rate)) / rate
    tone = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12) if pitch * k < rate / 2)
    rhythm = np.clip(np.sin(2 * np.pi * 4 * time), 0, None)
    return np.asarray(loudness * 0.5 * tone * rhythm, dtype=np.float32)


def write(path: Path, samples: Samples, rate: int = 16_000, channels: int = 1, subtype: str | None = None) -> Path:
    """Writes a format of libsndfile, named by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([samples] * channels, axis=1), rate, subtype=subtype)
    return path


def encode(
    path: Path,
    samples: Samples,
    codec: str,
    rate: int,
    *,
    layout: str = "mono",
    container: str | None = None,
    video: bool = False,
    picture_codec: str = "mpeg4",
    options: dict[str, str] | None = None,
) -> Path:
    """Writes samples of 16 kHz with an encoder of FFmpeg at another rate, with a moving picture beside it if wanted."""
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        picture: Any = out.add_stream(picture_codec, rate=25) if video else None
        stream: Any = out.add_stream(codec, rate=rate)
        stream.layout = layout
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
            for index in range(int(len(samples) / 16_000 * 25)):
                shade = np.full((48, 64, 3), index % 256, dtype=np.uint8)
                out.mux(picture.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
            out.mux(picture.encode(None))
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate = 16_000
        queue, written = av.AudioFifo(), 0
        block: av.AudioFrame | None
        for piece in resampler.resample(frame) + resampler.resample(None):
            piece.pts = None
            queue.write(piece)
        size = stream.codec_context.frame_size or 1024
        while (block := queue.read(size) or queue.read()) is not None:
            block.pts = written
            written += block.samples
            out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    return path


def mux_sound(out: Any, stream: Any, samples: Samples, start: float, block_size: int = 1024) -> None:
    """Encodes samples at the stream's own rate, whole blocks of them, with timestamps from `start` seconds on."""
    kind, rate = stream.codec_context.format.name, stream.codec_context.sample_rate
    for at in range(0, len(samples) // block_size * block_size, block_size):
        block = samples[None, at : at + block_size]
        if kind == "s16":
            block = np.asarray(block * 32767, dtype=np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format=kind, layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(start * rate) + at
        out.mux(stream.encode(frame))


def film(
    path: Path,
    count: int = 30,
    codec: str = "libx264",
    *,
    rate: int = 25,
    milliseconds: Sequence[int] | None = None,
    keyframe_every: int = 10,
    rotation: int | None = None,
    sound: Samples | None = None,
    container: str | None = None,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Writes `count` frames of 64 x 48 pixels, evenly at `rate` or at given times, with sound of 16 kHz if wanted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=codec_options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.gop_size = keyframe_every
        if milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if sound is not None:
            voice_stream: Any = out.add_stream("aac", rate=16_000, layout="mono")
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            whole = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            whole.sample_rate, whole.pts = 16_000, 0
            queue, written = av.AudioFifo(), 0
            queue.write(whole)
            while (block := queue.read(1024) or queue.read()) is not None:
                block.pts = written
                written += block.samples
                out.mux(voice_stream.encode(block))
            out.mux(voice_stream.encode(None))
    return path


def trim(whole: Path, path: Path, frames: int, rate: int = 25) -> Path:
    """As `ffmpeg -ss ... -c copy`: packets from the keyframe before the cut on, hidden up to it by an edit list."""
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
                back = int(Fraction(frames, rate) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, stream
                out.mux(packet)
    return path


def set_edit_list(whole: Path, path: Path, entries: Sequence[tuple[int, int | None]], rate: int = 25) -> Path:
    """Copies an MP4 whose index is its last box and gives its track an edit list.

    Args:
        whole: The film.
        path: Where the copy goes.
        entries: Milliseconds of each stretch, and the frame it begins with or None for nothing on screen.
        rate: Frames per second.
    """
    data = whole.read_bytes()
    with av.open(str(whole)) as container:
        stream = container.streams.video[0]
        unit = stream.time_base
        delay = -min(packet.dts for packet in container.demux(stream) if packet.dts is not None)
    assert unit is not None

    def find(name: bytes, start: int, end: int) -> tuple[int, int]:
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
            assert start < end
        return start, start + int.from_bytes(data[start : start + 4], "big")

    movie, end = find(b"moov", 0, len(data))
    assert end == len(data)
    track, track_end = find(b"trak", movie + 8, end)
    old, old_end = find(b"edts", track + 8, track_end)
    begins = [-1 if frame is None else int(Fraction(frame, rate) / unit) + delay for _, frame in entries]
    rows = b"".join(
        length.to_bytes(4, "big") + begin.to_bytes(4, "big", signed=True) + b"\0\1\0\0"
        for (length, _), begin in zip(entries, begins, strict=True)
    )
    table = (16 + len(rows)).to_bytes(4, "big") + b"elst" + bytes(4) + len(entries).to_bytes(4, "big") + rows
    box = (8 + len(table)).to_bytes(4, "big") + b"edts" + table
    sizes = {at: until - at + len(box) - (old_end - old) for at, until in ((movie, end), (track, track_end))}
    edited = bytearray(data[:old] + box + data[old_end:])
    for at, size in sizes.items():
        edited[at : at + 4] = size.to_bytes(4, "big")
    path.write_bytes(edited)
    return path


def numbered(number: int) -> NDArray[np.uint8]:
    """(48, 64, 3) uint8: eight blocks along the top, the lowest bit on the left; all else is grey."""
    frame = np.full((48, 64, 3), 110, dtype=np.uint8)
    for bit in range(8):
        frame[:16, 8 * bit : 8 * bit + 8] = 240 if number >> bit & 1 else 16
    return frame


def number_of(frame: Any) -> int:
    """What a (3, 48, 64) frame, or one of another size but the same shape, says."""
    height, width = frame.shape[1:]
    blocks = frame[:, : height // 3].float().mean((0, 1)).reshape(8, width // 8).mean(1)
    return sum(int(block > 110) << bit for bit, block in enumerate(blocks))
