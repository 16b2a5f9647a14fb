"""Real sound files for tests: a voice-like signal, written by libsndfile or by FFmpeg's encoders through PyAV."""

from __future__ import annotations

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
    options: dict[str, str] | None = None,
) -> Path:
    """Writes samples of 16 kHz with an encoder of FFmpeg at another rate, with a moving picture beside it if wanted."""
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        picture = out.add_stream("mpeg4", rate=25) if video else None
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
