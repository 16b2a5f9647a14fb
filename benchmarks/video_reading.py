"""What reads video frames right, and how fast: PyAV and decord behind our reader, decord alone, torchcodec (exact).

    python benchmarks/video_reading.py [--seconds 20] [--size 640x360]

Films are made here, every frame with its number as black and white bars; the right number is that of PyAV's plain
decoding from the first packet to the last. Jobs: 8 frames spread evenly, one frame a second over the whole film, every
frame. Each job runs in a process of its own with one thread; printed are frames given per second of wall clock with
opening (the best of three), wrong frames, and the growth of peak memory. torchcodec is left out where it is absent; it
needs the libraries of FFmpeg beside it. Nothing here is part of the tests.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

BITS = 11
RATE = 25
# Name, encoder, options, pixels as Matroska or MP4 ..., and whether the first half second is cut off by an edit list.
FILMS: tuple[tuple[str, str, dict[str, str], bool], ...] = (
    ("h264.mp4", "libx264", {"preset": "veryfast", "g": "100"}, False),
    ("h264-trimmed.mp4", "libx264", {"preset": "veryfast", "g": "100"}, True),
    ("hevc-closed.mp4", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none:open-gop=0"}, False),
    ("hevc-open.mkv", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}, False),
    ("mpeg4-b.mp4", "mpeg4", {"bf": "2"}, False),
    ("vp9.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "100"}, False),
    ("av1.mp4", "libsvtav1", {"preset": "12", "g": "100"}, False),
    ("mpeg2.ts", "mpeg2video", {"bf": "2"}, False),
)
JOBS = ("8 frames", "1 fps", "all")
READERS = ("ours, PyAV", "ours, decord", "decord alone", "torchcodec")


def picture(number: int, width: int, height: int) -> np.ndarray:
    """Bars that carry the number, over noise that moves, so that a decoder has work to do."""
    noise = np.random.default_rng(number // 8).integers(90, 130, (height // 8, width // 8, 3), dtype=np.uint8)
    frame = np.roll(noise, number, axis=1).repeat(8, axis=0).repeat(8, axis=1)[:height, :width].copy()
    side = width // BITS
    for bit in range(BITS):
        frame[: height // 2, bit * side : (bit + 1) * side] = 255 * (number >> bit & 1)
    return frame


def number_in(frame: np.ndarray) -> int:
    """What the bars of (height, width, 3) say."""
    side = frame.shape[1] // BITS
    row = frame[frame.shape[0] // 4, :, 0]
    return sum(int(row[bit * side + side // 2] > 128) << bit for bit in range(BITS))


def make(path: Path, codec: str, options: dict[str, str], frames: int, width: int, height: int) -> None:
    """Writes a film."""
    import av

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.bit_rate = 4_000_000
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def trim(path: Path, frames: int) -> None:
    """Hides the first frames of a film behind an edit list, without encoding."""
    import av

    whole = path.with_name(f"whole-{path.name}")
    path.rename(whole)
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.pts is not None and packet.dts is not None and packet.time_base is not None:
                back = int(Fraction(frames, RATE) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, stream
                out.mux(packet)


def plain(path: Path) -> list[int]:
    """The number of every frame, decoded from the first packet to the last."""
    import av

    with av.open(str(path)) as container:
        return [number_in(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def frame_indices(job: str, frames: int) -> list[int]:
    """Which frames a job asks for."""
    if job == "8 frames":
        return [int(place) for place in np.linspace(0, frames - 1, 8)]
    return list(range(0, frames, RATE if job == "1 fps" else 1))


def read(reader: str, path: Path, job: str, frames: int) -> Iterator[np.ndarray]:
    """The frames of a job as (height, width, 3)."""
    wanted = frame_indices(job, frames)
    if reader.startswith("ours"):
        from tokenthrift.media.video import read_frames, stream_frames

        which: Any = "decord" if reader.endswith("decord") else "pyav"
        pieces = (
            [read_frames(path, count=8, reader=which)]
            if job == "8 frames"
            else stream_frames(path, fps=1 if job == "1 fps" else None, reader=which)
        )
        for piece in pieces:
            yield from piece.pixels.permute(0, 2, 3, 1).numpy()
    elif reader == "decord alone":
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        frames_of = decord.VideoReader(str(path), num_threads=1)
        for start in range(0, len(wanted), 8):
            yield from frames_of.get_batch(wanted[start : start + 8]).asnumpy()
    else:
        from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

        decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1)
        for start in range(0, len(wanted), 8):
            yield from decoder.get_frames_at(wanted[start : start + 8]).data.permute(0, 2, 3, 1).numpy()


def work(reader: str, path: Path, job: str, expected: list[int]) -> dict[str, Any]:
    """One job: frames a second, wrong frames, growth of peak memory in MB."""
    list(_try(lambda: [next(read(reader, path, "8 frames", len(expected)))]))  # imports are not reading
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = [expected[i] for i in frame_indices(job, len(expected))]
    best, numbers = 0.0, list[int]()
    for _ in range(3):
        start, numbers, spent = time.perf_counter(), [], 0.0
        for frame in read(reader, path, job, len(expected)):
            pause = time.perf_counter()
            numbers.append(number_in(frame))
            spent += time.perf_counter() - pause
        best = max(best, len(numbers) / (time.perf_counter() - start - spent))
    wrong = sum(a != b for a, b in zip(numbers, wanted, strict=False)) + abs(len(numbers) - len(wanted))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"fps": round(best, 1), "wrong": wrong, "of": len(wanted), "memory": round(growth)}


def _try(action: Callable[[], list[Any]]) -> list[Any]:
    try:
        return action()
    except Exception:
        return []


def main() -> None:
    """Prints a table for every film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--size", default="640x360")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        reader, path, job, expected = arguments.work
        print(json.dumps(work(reader, Path(path), job, json.loads(expected))))
        return
    width, height = map(int, arguments.size.split("x"))
    print(f"{'film':18}{'job':10}" + "".join(f"{reader:>26}" for reader in READERS))
    print(f"{'':28}" + f"{'frames/s, wrong, MB':>26}" * len(READERS))
    with tempfile.TemporaryDirectory() as folder:
        for name, codec, options, trimmed in FILMS:
            path = Path(folder, name)
            make(path, codec, options, arguments.seconds * RATE, width, height)
            if trimmed:
                trim(path, RATE // 2)
            expected = json.dumps(plain(path))
            for job in JOBS:
                cells = []
                for reader in READERS:
                    run = subprocess.run(
                        [sys.executable, __file__, "--work", reader, str(path), job, expected],
                        capture_output=True,
                        text=True,
                    )
                    if run.returncode:
                        cells.append("absent" if "No module named" in run.stderr else "error")
                    else:
                        row = json.loads(run.stdout.splitlines()[-1])
                        cells.append(f"{row['fps']:.0f}, {row['wrong']} of {row['of']}, {row['memory']}")
                print(f"{name:18}{job:10}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
