"""Video files to frames: the right frame at the right time from every container, and a stated result for bad ones."""

import importlib
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.media_files import encode, film, number_of, voice
from tokenthrift import extras
from tokenthrift.media import decoders, picture_track, video
from tokenthrift.media.audio import read_audio
from tokenthrift.media.files import find_files
from tokenthrift.media.mp4 import display_rotation
from tokenthrift.media.suffixes import VIDEO_SUFFIXES
from tokenthrift.media.video import VideoError, probe, read_frames, read_frames_at, spread, stream_frames

# Suffix and encoder; the last is one that decord's own FFmpeg does not know.
KINDS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "ts": "mpeg2video",
    "mov": "mpeg4",
    "av1.mp4": "libsvtav1",
}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One film of 30 frames at 25 a second per kind, with keyframes at 0, 10 and 20."""
    folder = tmp_path_factory.mktemp("films")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = film(folder / f"film.{kind}", codec=KINDS[kind])
        return made[kind]

    return get


@pytest.fixture
def without_decord(monkeypatch: pytest.MonkeyPatch) -> None:
    require = extras.require

    def refuse(module: str) -> Any:
        if module == "decord":
            raise extras.MissingExtraError(module)
        return require(module)

    monkeypatch.setattr(extras, "require", refuse)


def numbers(pixels: Tensor) -> list[int]:
    return [number_of(frame) for frame in pixels]


@pytest.mark.parametrize("kind", KINDS)
def test_probe_tells_length_and_size_and_the_frames_are_those(kind: str, films: Callable[[str], Path]) -> None:
    path = films(kind)
    info = probe(path)
    assert info == picture_track.read_track(path).info
    assert (info.frames, info.height, info.width, info.audio) == (30, 48, 64, False)
    assert info.seconds == pytest.approx(1.2, abs=0.002)
    assert info.fps == pytest.approx(25, rel=0.002)
    codec = KINDS[kind].removeprefix("lib").removeprefix("svt").removeprefix("vpx-")
    assert info.codec == {"x264": "h264"}.get(codec, codec)
    frames = read_frames(path, count=7)
    assert frames.pixels.shape == (7, 3, 48, 64)
    assert frames.pixels.dtype == torch.uint8
    assert numbers(frames.pixels) == [0, 4, 9, 14, 19, 24, 29]
    assert (frames.seconds - frames.seconds[0]).tolist() == pytest.approx(
        [n / 25 for n in [0, 4, 9, 14, 19, 24, 29]], abs=0.002
    )


@pytest.mark.parametrize("kind", ["mp4", "webm", "ts"])
@given(places=st.lists(st.integers(-30, 29), max_size=6))
@settings(deadline=None, max_examples=10)
def test_any_indices_in_any_order(kind: str, films: Callable[[str], Path], places: list[int]) -> None:
    frames = read_frames(films(kind), indices=places)
    assert numbers(frames.pixels) == [place % 30 for place in places]
    assert frames.seconds.shape == (len(places),)


@pytest.mark.usefixtures("without_decord")
def test_without_decord_all_is_the_same(films: Callable[[str], Path]) -> None:
    assert numbers(read_frames(films("mp4"), indices=[29, 0, 12], reader="decord").pixels) == [29, 0, 12]


def test_more_frames_than_there_are_gives_each_once(films: Callable[[str], Path]) -> None:
    assert numbers(read_frames(films("mp4"), count=64).pixels) == list(range(30))
    assert numbers(read_frames(films("mp4"), count=1).pixels) == [0]
    assert (spread(1, 3), spread(3, 8)) == ([0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 2])


def test_folders_give_every_common_kind(tmp_path: Path) -> None:
    """Found by its suffix, and read."""
    kinds = {
        **{"flv": "flv", "mpg": "mpeg1video", "m2v": "mpeg2video", "vob": "mpeg2video", "ts": "mpeg2video"},
        **{"wmv": "wmv2", "3gp": "mpeg4", "f4v": "libx264", "mts": "libx264", "y4m": "rawvideo"},
    }
    for kind, codec in kinds.items():
        film(tmp_path / f"x.{kind}", 6, codec, container={"mts": "mpegts", "y4m": "yuv4mpegpipe"}.get(kind))
    first, *others = (Image.new("L", (64, 48), 40 * number) for number in range(6))
    first.save(tmp_path / "x.GIF", save_all=True, append_images=others, duration=40)
    (tmp_path / "x.txt").write_text("no video")
    found = [file.path for file in find_files([str(tmp_path)], VIDEO_SUFFIXES, "video")]
    assert {path.suffix.lower()[1:] for path in found} == {*kinds, "gif"}
    assert [len(read_frames(path, count=9).pixels) for path in found] == [6] * len(found)


def test_frames_are_named_in_one_way_and_exist(films: Callable[[str], Path]) -> None:
    path = films("mp4")
    with pytest.raises(ValueError, match="exactly one"):
        read_frames(path)
    with pytest.raises(ValueError, match="exactly one"):
        read_frames(path, count=2, seconds=[0.0])
    with pytest.raises(ValueError, match="at least 1"):
        read_frames(path, count=0)
    with pytest.raises(IndexError, match="30 frames, none of index 30"):
        read_frames(path, indices=[30])
    for second in (-0.1, 1.3, float("nan")):
        with pytest.raises(VideoError, match="nothing is shown"):
            read_frames(path, seconds=[second])
    with pytest.raises(ValueError, match="positive"):
        read_frames_at(path, 0)
    with pytest.raises(ValueError, match="at least one frame"):
        next(stream_frames(path, chunk=0))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate_goes_by_timestamps(suffix: str, tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 1000, 1040, 3000]
    path = film(tmp_path / f"film.{suffix}", 7, milliseconds=times)
    track = picture_track.read_track(path)
    assert track.seconds == pytest.approx([t / 1000 for t in times], abs=1e-3)
    assert probe(path).frames == 7
    assert probe(path).seconds >= 3.0
    frames = read_frames(path, seconds=[2.9, 0.0, 0.49, 0.5, 1.02, 3.0])
    assert numbers(frames.pixels) == [5, 0, 2, 3, 4, 6]
    assert frames.seconds.tolist() == pytest.approx([1.04, 0, 0.08, 0.5, 1.0, 3.0], abs=1e-3)
    at_two = read_frames_at(path, 2)
    assert numbers(at_two.pixels)[:6] == [0, 3, 4, 5, 5, 5]


@pytest.mark.parametrize(("rate", "fps"), [(30, 25), (10, 25), (25, 25), (30, 10)])
def test_a_fixed_rate_shows_what_is_on_screen(rate: int, fps: int, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 60, rate=rate)
    frames = read_frames_at(path, fps)
    wanted = [min(int(k * rate / fps + 1e-6), 59) for k in range(round(60 / rate * fps))]
    assert numbers(frames.pixels) == wanted
    assert frames.seconds.tolist() == pytest.approx([k / fps for k in range(len(wanted))])
    pieces = list(stream_frames(path, fps=fps, chunk=7))
    assert [len(p.pixels) for p in pieces[:-1]] == [7] * (len(pieces) - 1)
    assert torch.equal(torch.cat([p.pixels for p in pieces]), frames.pixels)
    assert torch.equal(torch.cat([p.seconds for p in pieces]), frames.seconds)


def test_sound_and_frames_begin_together(tmp_path: Path) -> None:
    late = [400 + 40 * k for k in range(20)]
    path = film(tmp_path / "film.mkv", 20, milliseconds=late, sound=voice(1.2))
    assert probe(path).audio
    frames = read_frames_at(path, 25)
    assert numbers(frames.pixels) == [0] * 10 + list(range(20))
    assert len(frames.pixels) / 25 == pytest.approx(len(read_audio(path)) / 16_000, abs=0.1)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_phone_gives_upright_frames(rotation: int, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 12, rotation=rotation)
    assert display_rotation(path) == rotation
    info, frames = probe(path), read_frames(path, indices=[11, 5])
    assert (info.height, info.width) == ((48, 64) if rotation == 180 else (64, 48))
    assert frames.pixels.shape[2:] == (info.height, info.width)
    upright = torch.rot90(frames.pixels, -rotation // 90, (2, 3))
    assert numbers(upright) == [11, 5]


def test_resizing_does_not_depend_on_the_decoder(films: Callable[[str], Path]) -> None:
    frames = read_frames(films("mp4"), count=3, size=(24, 40))
    assert frames.pixels.shape == (3, 3, 24, 40)
    assert numbers(frames.pixels) == [0, 14, 29]
    again = read_frames(films("mp4"), count=3, size=(24, 40), reader="decord")
    assert (frames.pixels.int() - again.pixels.int()).abs().max() <= 2


def test_a_stream_holds_one_chunk(films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    given_out: list[int] = []
    decode = decoders.decode

    def counting(*args: Any) -> Any:
        for frame in decode(*args):
            given_out.append(1)
            yield frame

    monkeypatch.setattr(video, "decode", counting)
    first = next(stream_frames(films("mp4"), chunk=4))
    assert numbers(first.pixels) == [0, 1, 2, 3]
    assert len(given_out) == 4


def test_one_thread_unless_told(films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decord = pytest.importorskip("decord")
    asked = []
    reader = decord.VideoReader

    def spy(path: str, num_threads: int) -> Any:
        asked.append(num_threads)
        return reader(path, num_threads=num_threads)

    monkeypatch.setattr(decord, "VideoReader", spy)
    read_frames(films("mp4"), count=1)
    read_frames(films("mp4"), count=1, reader="decord")
    read_frames(films("mp4"), count=1, reader="decord", threads=2)
    assert asked == [1, 2]


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    short = path.with_name(f"cut-{path.name}")
    short.write_bytes(data[: int(len(data) * share)])
    return short


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "message"),
    [
        ("mp4", "libx264", {}, "cut short"),  # the index was at the end
        ("mp4", "libx264", {"movflags": "faststart"}, "cut short"),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, None),  # states no length
        ("mkv", "libx264", {}, "cut short"),
        ("avi", "mpeg4", {}, "cut short"),
        ("ts", "mpeg2video", {}, None),
    ],
)
def test_a_truncated_file(
    suffix: str, codec: str, options: dict[str, str], message: str | None, tmp_path: Path
) -> None:
    whole = film(tmp_path / f"film.{suffix}", 100, codec, options=options)
    for share in (0.5, 0.8):
        short = cut(whole, share)
        if message is None:
            assert 10 < probe(short).frames < 100
            assert numbers(read_frames(short, count=2).pixels)[0] == 0
            continue
        for read in (probe, lambda p: read_frames(p, count=4), lambda p: read_frames_at(p, 25)):
            with pytest.raises(VideoError, match=message):
                read(short)


def test_files_that_are_no_video(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    sound = encode(tmp_path / "sound.m4a", voice(0.5), "aac", 16_000)
    cover = tmp_path / "cover.mp3"
    with av.open(str(cover), "w") as out:
        audio: Any = out.add_stream("mp3", rate=16_000)
        picture: Any = out.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic.value
        out.mux(picture.encode(av.VideoFrame(64, 48, "yuvj420p")))
        out.mux(picture.encode(None))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        tone.sample_rate, tone.pts = 16_000, 0
        out.mux(audio.encode(tone))
        out.mux(audio.encode(None))
    frameless = film(tmp_path / "none.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    frameless.write_bytes(frameless.read_bytes().partition(b"moof")[0][:-4])
    cases: list[tuple[Path, bytes | None, str]] = [
        (tmp_path / "missing.mp4", None, "cannot be read: No such file"),
        (tmp_path, None, "cannot be read: Is a directory"),
        (tmp_path / "empty.mp4", b"", "empty: a file of 0 bytes"),
        (tmp_path / "text.mp4", b"not a film at all\n" * 50, "not a video|no video"),
        (tmp_path / "noise.mp4", noise, "not a video|no video"),
        (sound, None, "no video: the file holds no picture track"),
        (cover, None, "no video: only cover art"),
        (frameless, None, "empty: the picture track holds no frame"),
    ]
    for path, data, message in cases:
        if data is not None:
            path.write_bytes(data)
        for read in (probe, lambda p: read_frames(p, count=4)):
            with pytest.raises(VideoError, match=message) as caught:
                read(path)
            assert caught.value.path == path


def test_damage_is_found_when_its_frame_is_wanted_and_not_by_probing(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 60, keyframe_every=20)
    with av.open(str(path)) as container:
        entries = [(p.pos, p.size) for p in container.demux(video=0) if p.pos is not None]
    data = bytearray(path.read_bytes())
    for at, size in entries[20:]:
        data[at : at + size] = bytes(size)
    path.write_bytes(data)
    info = probe(path)
    assert info.frames == 60
    assert info.seconds == pytest.approx(2.4)
    with pytest.raises(VideoError, match=r"corrupt: no pixels for the frame at 2\.36 s"):
        read_frames(path, indices=[0, 59])


def test_a_packet_without_a_frame_shows_the_one_before(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 30, "mpeg4", keyframe_every=30)
    with av.open(str(path)) as container:
        at, size = next(
            itertools.islice(((p.pos, p.size) for p in container.demux(video=0) if p.pos is not None), 12, 13)
        )
    data = bytearray(path.read_bytes())
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    track = picture_track.read_track(path)
    frames = read_frames(path, indices=[11, 12, 29])
    assert numbers(frames.pixels)[0] == 11
    assert numbers(frames.pixels)[1] in (11, 12)
    assert track.info.frames == 30


def test_a_header_that_asks_for_too_much_is_refused(
    films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_track, "MAX_PIXELS", 3000)
    with pytest.raises(VideoError, match="corrupt: frames of 64 x 48 pixels"):
        probe(films("mp4"))


def test_without_pyav_the_message_says_what_to_install(
    films: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = films("mp4")

    def absent(module: str) -> Any:
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(extras.MissingExtraError, match="pip install"):
        probe(path)


def test_a_stream_without_its_index_is_read_by_its_packets(films: Callable[[str], Path]) -> None:
    """PyAV 15 does not show the index of a file."""
    with picture_track.open_track(films("mp4")) as (container, stream):
        assert (picture_track._header_times(container, stream) is not None) == hasattr(stream, "index_entries")
        old = SimpleNamespace(frames=stream.frames, duration=stream.duration, time_base=stream.time_base)
        assert picture_track._header_times(container, old) is None
