"""Random films with a number in every frame and a tone for every second, read back; and damaged files of every kind.

Film: random codec, container, frame times, start of the sound, gaps, tracks. The independent reading is what was
written, at the timestamps it was written with. Damage: bytes changed, cut out, repeated or cut off; whatever happens is
a result of bounded size or an error of the reader, never a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.media_files import encode, film, mux_sound, number_of, numbered, voice, write
from tokenthrift.media.audio import read_audio, stream_audio
from tokenthrift.media.container import start_of
from tokenthrift.media.errors import MediaError
from tokenthrift.media.image import image_size, read_image
from tokenthrift.media.picture_track import read_track
from tokenthrift.media.probe import probe
from tokenthrift.media.video import read_frames, stream_frames

av.logging.set_level(av.logging.PANIC)

RATE = 16_000
FILMS = {
    "mp4": (["libx264", "libx265", "mpeg4", "libvpx-vp9"], "aac"),
    "mkv": (["libx264", "libx265", "mpeg4", "libvpx-vp9"], "pcm_s16le"),
    "webm": (["libvpx", "libvpx-vp9"], "libopus"),
    "ts": (["libx264", "mpeg2video"], "mp2"),
}
OPTIONS = {
    "libx265": {"x265-params": "log-level=none:keyint=10:min-keyint=3"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
}


@st.composite
def films(draw: st.DrawFn) -> dict[str, Any]:
    suffix = draw(st.sampled_from(sorted(FILMS)))
    codec = draw(st.sampled_from(FILMS[suffix][0]))
    even = codec == "mpeg2video" or draw(st.booleans())
    count = draw(st.integers(2, 40))
    steps = [40] * count if even else draw(st.lists(st.integers(20, 300), min_size=count, max_size=count))
    return {
        "suffix": suffix,
        "codec": codec,
        "times": [sum(steps[:number]) for number in range(count)],
        "group": draw(st.sampled_from([1, 7, 60])),
        "b_frames": draw(st.booleans()),
        # Where each second of tone starts, in tenths; what lies between is silence.
        "tones": [draw(st.integers(0, 6)), draw(st.integers(18, 26)), draw(st.integers(38, 46))],
        "second_track": suffix in ("mp4", "mkv") and draw(st.booleans()),
    }


def make(path: Path, plan: dict[str, Any]) -> Path:
    codec, sound = plan["codec"], FILMS[plan["suffix"]][1]
    rate = 48_000 if sound == "libopus" else RATE
    with av.open(str(path), "w") as out:
        options = dict(OPTIONS.get(codec, {}))
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            options["bf"] = "2" if plan["b_frames"] else "0"
        video: Any = out.add_stream(codec, rate=25, options=options)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", plan["group"]
        if codec != "mpeg2video":
            video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        audios: list[Any] = [out.add_stream(sound, rate=rate, layout="mono") for _ in range(1 + plan["second_track"])]
        for number, time in enumerate(plan["times"]):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            if codec == "mpeg2video":
                frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for track, audio in enumerate(audios):
            size = 960 if rate == 48_000 else 1024
            for index, tenth in enumerate(plan["tones"]):
                hertz = 300 + 200 * index + 1500 * track
                tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate).astype(np.float32)
                mux_sound(out, audio, tone, tenth / 10, size)
            out.mux(audio.encode(None))
    return path


def test_a_film_of_few_pictures_starts_with_them_though_its_sound_is_later(tmp_path: Path) -> None:
    plan = {"suffix": "mkv", "codec": "libx264", "times": [0, 40], "group": 1, "b_frames": False}
    path = make(tmp_path / "film.mkv", plan | {"tones": [1, 18, 38], "second_track": False})
    assert read_track(path).seconds == pytest.approx([0.0, 0.04], abs=0.002)
    sound = read_audio(path).numpy()
    assert np.abs(sound[: int(0.05 * RATE)]).max() < 0.01
    assert np.abs(sound[int(0.2 * RATE) : int(0.3 * RATE)]).max() > 0.3


@pytest.mark.parametrize("options", [{}, {"live": "1"}, {"cluster_time_limit": "0"}])
def test_second_zero_is_the_first_picture_or_sound_of_a_matroska_file(options: dict[str, str], tmp_path: Path) -> None:
    """Neither a subtitle long before it, nor the samples that a decoder drops first, which FFmpeg stamps earlier."""
    path, lines = tmp_path / "film.mkv", tmp_path / "lines.srt"
    lines.write_text("1\n00:00:00,000 --> 00:00:00,500\nsoon\n")
    with av.open(str(lines)) as source, av.open(str(path), "w", options=options) as out:
        text: Any = out.add_stream_from_template(source.streams[0])
        sound: Any = out.add_stream("libopus", rate=48_000, layout="mono")
        line = next(source.demux())
        line.stream = text
        out.mux(line)
        mux_sound(out, sound, np.sin(np.arange(48_000)).astype(np.float32), 3, 960)
        out.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert float(start_of(path, container)) == pytest.approx(3, abs=0.0011)
    assert len(read_audio(path)) / RATE == pytest.approx(1, abs=0.03)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(plan=films(), data=st.data())
def test_random_films_read_back_as_they_were_written(
    plan: dict[str, Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = make(tmp_path_factory.mktemp("film") / f"film.{plan['suffix']}", plan)
    times, count = [time / 1000 for time in plan["times"]], len(plan["times"])
    track = read_track(path)
    assert track.info.frames == count
    assert track.seconds == pytest.approx(times, abs=0.1 if plan["suffix"] == "ts" else 0.012)
    shift = track.seconds[0] - times[0]
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    for reader in ("pyav", "decord"):
        found = read_frames(path, indices=places, reader=reader)
        assert [number_of(frame) for frame in found.pixels] == places
    moments = data.draw(st.lists(st.integers(0, count - 2), max_size=4))
    middles = [shift + (times[place] + times[place + 1]) / 2 for place in moments]
    if middles:
        assert [number_of(f) for f in read_frames(path, seconds=middles).pixels] == moments
    whole = torch.cat([piece.pixels for piece in stream_frames(path)])
    assert [number_of(frame) for frame in whole] == list(range(count))
    for number in range(1, 2 + plan["second_track"]):
        sound = read_audio(path, track=number).numpy()
        for index, tenth in enumerate(plan["tones"]):
            middle = sound[int((tenth / 10 + 0.3) * RATE) : int((tenth / 10 + 0.7) * RATE)]
            hertz = np.abs(np.fft.rfft(middle)).argmax() * RATE / len(middle)
            assert hertz == pytest.approx(300 + 200 * index + 1500 * (number - 1), abs=10)
            before = sound[int((tenth / 10 - 0.3) * RATE) : int((tenth / 10 - 0.15) * RATE)]
            ended = index == 0 or plan["tones"][index - 1] + 10 < tenth - 4
            assert not (ended and tenth >= 3) or np.abs(before).max() < 0.1


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    sound = voice(0.5)
    made = [
        film(folder / "a.mp4", 8, sound=sound),
        film(folder / "b.mp4", 8, "mpeg4", options={"movflags": "frag_keyframe+empty_moov"}),
        film(folder / "a.mkv", 8, sound=sound),
        film(folder / "a.webm", 8, "libvpx"),
        film(folder / "a.avi", 8, "mpeg4"),
        film(folder / "a.ts", 8, "mpeg2video"),
        film(folder / "a.flv", 8, "flv"),
        write(folder / "a.wav", sound),
        write(folder / "a.flac", sound),
        write(folder / "a.ogg", sound),
        write(folder / "a.mp3", sound),
        encode(folder / "a.m4a", sound, "aac", RATE),
        encode(folder / "a.opus", sound, "libopus", 48_000),
    ]
    for form in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        made.append(folder / f"p.{form}")
        Image.effect_noise((24, 16), 50).convert("RGB").save(made[-1])
    return {path.name: path.read_bytes() for path in made}


def _damaged(draw: Callable[[Any], Any], data: bytes) -> bytes:
    broken = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        # Headers stand at the ends, and a random place is mostly in the pixels.
        if len(broken) < 2:
            break
        edge = draw(st.sampled_from([len(broken) - 1, min(200, len(broken) - 1)]))
        at = draw(st.integers(0, edge))
        if draw(st.booleans()):
            at = len(broken) - 1 - at
        kind = draw(st.sampled_from(["byte", "word", "cut", "repeat", "end"]))
        if kind == "byte":
            broken[at] = draw(st.integers(0, 255))
        elif kind == "word":
            broken[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\0\1\0\0"]))
        elif kind == "cut":
            del broken[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            broken[at:at] = broken[at : at + 64]
        else:
            del broken[max(at, 1) :]
    return bytes(broken) or b"\0"


def _sizes(path: Path) -> Iterator[Callable[[], int]]:
    """Readers, each giving the bytes of what it read, a bounded part of it."""
    yield lambda: sum(piece.nbytes for piece in islice(stream_audio(path), 200))
    yield lambda: sum(piece.pixels.nbytes for piece in islice(stream_frames(path, fps=5, size=(8, 8)), 20))
    yield lambda: read_frames(path, count=2, size=(8, 8)).pixels.nbytes
    yield lambda: read_image(path).nbytes
    yield lambda: 4 * image_size(path)[0]
    yield lambda: len(probe(path).kind)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_a_clear_error_or_a_bounded_result(
    data: st.DataObject, valid: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(valid)))
    path = tmp_path_factory.getbasetemp() / f"fuzz-{name}"
    path.write_bytes(_damaged(data.draw, valid[name]))
    problems: list[MediaError] = []
    for read in _sizes(path):
        try:
            size = read()
        except MediaError as error:
            problems.append(error)
        else:
            assert size < 1_300_000_000
    assert all(error.path == path and 0 < len(error.reason) < 400 for error in problems)
