"""The frame a player shows, over codec x container x group of pictures x frame rate x edit list, by either reader.

The reference is PyAV's plain decoding from the first packet to the last; every frame carries its number, so that the
reference is itself checked against what was written. decord is compared pixel for pixel where it says it is exact.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from tests.media_files import encode, film, number_of, set_edit_list, trim, voice
from tokenthrift.media import decoders
from tokenthrift.media.audio import read_audio
from tokenthrift.media.picture_track import read_track
from tokenthrift.media.video import VideoError, read_frames, read_frames_at, stream_frames

av.logging.set_level(av.logging.PANIC)

FRAMES = 60
X265 = "log-level=none:keyint=20:min-keyint=5"
# Encoder, its options, and whether a decoder that starts at any keyframe is right from there on.
CODECS: dict[str, tuple[str, dict[str, str], bool]] = {
    "h264": ("libx264", {"keyint_min": "10", "sc_threshold": "0"}, True),
    "h264 open": ("libx264", {"x264-params": "open-gop=1:keyint=20:min-keyint=5:scenecut=0"}, False),
    "h264 refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}, False),
    "hevc open": ("libx265", {"x265-params": X265}, False),
    "hevc closed": ("libx265", {"x265-params": f"{X265}:open-gop=0"}, True),
    "mpeg4": ("mpeg4", {}, True),
    "mpeg4 with B": ("mpeg4", {"bf": "2"}, False),
    "mpeg2": ("mpeg2video", {}, True),
    "mpeg2 with B": ("mpeg2video", {"bf": "2"}, False),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}, True),
    "vp9": ("libvpx-vp9", {"deadline": "good", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "12"}, True),
    "av1": ("libsvtav1", {"preset": "12"}, False),
}
INDEXED = ("mp4", "mov", "mkv", "webm")
CASES = [
    *((codec, suffix) for codec in CODECS if codec != "vp8" for suffix in ("mp4", "mkv")),
    *(("h264", suffix) for suffix in ("mov", "ts", "avi")),
    *(("hevc open", suffix) for suffix in ("mov", "ts")),
    *(("mpeg4 with B", suffix) for suffix in ("mov", "ts", "avi")),
    *(("mpeg2 with B", suffix) for suffix in ("ts", "mpg")),
    *((codec, "webm") for codec in ("vp8", "vp9", "av1")),
]
RATES = {"even": None, "uneven": [sum((40, 40, 33, 80, 200)[k % 5] for k in range(n)) for n in range(FRAMES)]}


def plain(path: Path) -> list[tuple[int, np.ndarray]]:
    """Number and pixels of every frame, decoded from the first packet to the last."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [(number_of(torch.from_numpy(frame).permute(2, 0, 1)), frame) for frame in frames]


def compare(path: Path, reader: decoders.Reader, seed: int = 0) -> list[int]:
    """Reads places in any order, spread ones and the whole, and checks each against plain decoding."""
    reference = plain(path)
    pixels = np.stack([frame for _, frame in reference])
    places = [random.Random(seed).randrange(len(reference)) for _ in range(8)]
    off = 0 if reader == "pyav" else 2
    for wanted, frames in (
        (places, read_frames(path, indices=places, reader=reader)),
        (
            [int(k) for k in np.linspace(0, len(reference) - 1, 8)],
            read_frames(path, count=8, reader=reader),
        ),
    ):
        found = frames.pixels.permute(0, 2, 3, 1).numpy().astype(int)
        assert np.abs(found - pixels[wanted].astype(int)).max() <= off
    whole = torch.cat([piece.pixels for piece in stream_frames(path, reader=reader)]).permute(0, 2, 3, 1).numpy()
    assert len(whole) == len(reference)
    assert np.abs(whole.astype(int) - pixels.astype(int)).max() <= off
    return [number for number, _ in reference]


@pytest.mark.parametrize(("codec", "suffix"), CASES)
def test_every_reader_gives_what_plain_decoding_gives(codec: str, suffix: str, tmp_path: Path) -> None:
    encoder, options, restarts = CODECS[codec]
    for rate, times in RATES.items():
        if times is not None and (suffix in ("avi", "mpg") or encoder == "mpeg2video"):
            continue  # neither has a rate that varies
        path = film(
            tmp_path / f"{rate}.{suffix}", FRAMES, encoder, milliseconds=times, keyframe_every=20, codec_options=options
        )
        if codec != "av1":  # whose preset for speed does not keep every block apart
            assert compare(path, "pyav") == list(range(FRAMES))
        else:
            compare(path, "pyav")
        track = read_track(path)
        assert decoders.decord_is_exact(track) == (restarts and suffix in INDEXED)
        if times is not None and suffix != "avi":
            assert track.seconds == pytest.approx([t / 1000 for t in times], abs=2e-3)
        if decoders.decord_is_exact(track):
            pytest.importorskip("decord")
            assert decoders._decord_reader(track, 1) is not None
        compare(path, "decord")


def test_decord_is_not_opened_where_it_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decord = pytest.importorskip("decord")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decord was opened")

    monkeypatch.setattr(decord, "VideoReader", refuse)
    turned = film(tmp_path / "turned.mkv", 20, rotation=90)
    opened = film(tmp_path / "open.mp4", 50, "libx265", codec_options=CODECS["hevc open"][1])
    hidden = trim(film(tmp_path / "whole.mp4", 50), tmp_path / "trimmed.mp4", 13)
    stream = film(tmp_path / "stream.ts", 50, "mpeg2video")
    for path in (turned, opened, hidden, stream):
        read_frames(path, count=3, reader="decord")
    read_frames(film(tmp_path / "closed.mp4", 50), count=3)
    with pytest.raises(ValueError, match="no reader 'cv2'"):
        read_frames(opened, count=3, reader="cv2")  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", ["h264", "h264 open", "hevc open", "mpeg4 with B", "vp9"])
@pytest.mark.parametrize("group", [20, 60])
def test_a_film_trimmed_without_encoding(codec: str, group: int, tmp_path: Path) -> None:
    encoder, options, _ = CODECS[codec]
    options = {key: value.replace("keyint=20", f"keyint={group}") for key, value in options.items()}
    whole = film(tmp_path / "whole.mp4", FRAMES, encoder, keyframe_every=group, codec_options=options)
    path = trim(whole, tmp_path / "cut.mp4", 13)
    for reader in ("pyav", "decord"):
        assert compare(path, reader) == list(range(13, FRAMES))
    frames = read_frames(path, indices=range(5))
    assert [number_of(frame) for frame in frames.pixels] == [13, 14, 15, 16, 17]
    assert frames.seconds.tolist() == pytest.approx([k / 25 for k in range(5)], abs=1e-3)
    assert [number_of(frame) for frame in read_frames_at(path, 5).pixels[:4]] == [13, 18, 23, 28]


EDITS: dict[str, tuple[list[tuple[int, int | None]], list[int]]] = {
    "two stretches": ([(400, 13), (800, 30)], [*range(13, 23), *range(30, 50)]),
    "backwards": ([(400, 40), (800, 13)], [*range(40, 50), *range(13, 33)]),
    "the end hidden": ([(2000, 0)], list(range(50))),
    "late": ([(1000, None), (2400, 0)], list(range(60))),
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("group", [20, 60])
def test_edit_lists_of_every_shape(edits: str, group: int, tmp_path: Path) -> None:
    entries, shown = EDITS[edits]
    if edits == "backwards":
        group = 20  # within one group FFmpeg itself gives two frames one time
    whole = film(tmp_path / "whole.mp4", FRAMES, keyframe_every=group)
    path = set_edit_list(whole, tmp_path / "edited.mp4", entries)
    assert compare(path, "pyav") == shown
    assert compare(path, "decord", seed=1) == shown


def test_a_seek_that_leads_too_far_starts_at_the_beginning(tmp_path: Path) -> None:
    """Periodic intra refresh: what FFmpeg calls keyframes are not frames that a decoder can start at."""
    encoder, options, _ = CODECS["h264 refresh"]
    path = film(tmp_path / "film.mp4", FRAMES, encoder, codec_options=options)
    assert len(read_track(path).seek_points) > 1
    assert [number_of(f) for f in read_frames(path, indices=[59, 25, 3]).pixels] == [59, 25, 3]


def test_films_joined_byte_by_byte_are_refused(tmp_path: Path) -> None:
    part = film(tmp_path / "part.ts", 50, "mpeg2video")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part.read_bytes() * 2)
    with pytest.raises(VideoError, match=r"timestamps start again after \d\.\d s"):
        read_frames(joined, count=4)


def test_a_later_picture_is_not_cut_short_and_keeps_its_place(tmp_path: Path) -> None:
    """Matroska states the end of the track, and the picture begins a second after the sound."""
    times = [1000 + 40 * n for n in range(20)]
    for suffix in ("mkv", "mp4"):
        path = film(tmp_path / f"film.{suffix}", 20, milliseconds=times, sound=voice(1.8))
        frames = read_frames_at(path, 25)
        assert [number_of(f) for f in frames.pixels] == [0] * 25 + list(range(20))
        assert read_frames(path, indices=[0, 19]).seconds.tolist() == pytest.approx([1.0, 1.76], abs=0.002)


def test_sound_with_a_decoder_delay_does_not_move_the_pictures(tmp_path: Path) -> None:
    path = encode(tmp_path / "film.webm", voice(1.0), "libopus", 48_000, video=True, picture_codec="libvpx")
    assert read_track(path).seconds[:3] == pytest.approx([0, 0.04, 0.08], abs=1e-3)
    assert len(read_audio(path)) == pytest.approx(16_000, abs=400)


def _written(path: Path, frames: list[np.ndarray], codec: str, pix_fmt: str, source: str, **context: Any) -> Path:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25, options=context.pop("options", {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format=source)
            if "colorspace" in context:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=context["colorspace"])
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def _solid(height: int, width: int) -> list[np.ndarray]:
    return [np.full((height, width, 3), (200, 60, 30), np.uint8)] * 3


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "context"),
    [
        ("bt709.mp4", "libx264", "yuv420p", {"colorspace": 1}),
        ("bt2020-10bit.mp4", "libx265", "yuv420p10le", {"colorspace": 9, "options": {"x265-params": "log-level=none"}}),
        ("10bit.mkv", "ffv1", "yuv420p10le", {}),
        ("full.mp4", "libx264", "yuvj420p", {}),
        ("444.mp4", "libx264", "yuv444p", {}),
        ("odd.mp4", "mpeg4", "yuv420p", {}),
    ],
)
def test_colors_by_the_matrix_range_and_depth_that_a_file_states(
    name: str, codec: str, pix_fmt: str, context: dict[str, Any], tmp_path: Path
) -> None:
    height, width = (47, 63) if name.startswith("odd") else (48, 64)
    path = _written(tmp_path / name, _solid(height, width), codec, pix_fmt, "rgb24", **context)
    frames = read_frames(path, count=3)
    assert frames.pixels.shape == (3, 3, height, width)
    found = frames.pixels.float().mean((0, 2, 3))
    assert torch.allclose(found, torch.tensor([200.0, 60.0, 30.0]), atol=3)


def test_alpha_is_dropped_and_grey_is_grey(tmp_path: Path) -> None:
    clear = np.zeros((48, 64, 4), np.uint8)
    clear[..., :3] = 200, 60, 30
    path = _written(tmp_path / "clear.mov", [clear] * 2, "png", "rgba", "rgba")
    assert read_frames(path, count=1).pixels[0, :, 5, 5].tolist() == [200, 60, 30]
    grey = _written(tmp_path / "grey.mkv", [np.full((48, 64), 98, np.uint8)] * 2, "ffv1", "gray", "gray")
    assert read_frames(grey, count=1).pixels[0, :, 5, 5].tolist() == [98, 98, 98]


def test_pixels_that_are_not_square_are_not_stretched(tmp_path: Path) -> None:
    from fractions import Fraction

    path = _written(
        tmp_path / "wide.mp4", _solid(48, 64), "libx264", "yuv420p", "rgb24", sample_aspect_ratio=Fraction(2)
    )
    assert read_frames(path, count=1).pixels.shape == (1, 3, 48, 64)


def test_interlaced_frames_come_whole(tmp_path: Path) -> None:
    rows = np.zeros((48, 64, 3), np.uint8)
    rows[::2] = 235
    path = _written(
        tmp_path / "fields.mp4", [rows] * 3, "libx264", "yuv420p", "rgb24", options={"x264-params": "tff=1:crf=5"}
    )
    frame = read_frames(path, count=1).pixels[0].float().mean((0, 2))
    assert frame[8:40:2].min() - frame[9:40:2].max() > 100
    assert torch.equal(read_frames(path, count=1).pixels[0].permute(1, 2, 0), torch.from_numpy(plain(path)[0][1]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotation_is_done_and_told_in_every_container(suffix: str, rotation: int, tmp_path: Path) -> None:
    path = film(tmp_path / f"film.{suffix}", 12, rotation=rotation)
    track = read_track(path)
    assert track.rotation == rotation
    frames = read_frames(path, indices=[11, 5], reader="decord")
    assert frames.pixels.shape[2:] == (track.info.height, track.info.width)
    upright = torch.rot90(frames.pixels, -rotation // 90, (2, 3))
    assert [number_of(frame) for frame in upright] == [11, 5]


def test_a_gif_of_one_frame_and_a_header_that_counts_too_many(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "red").save(tmp_path / "one.gif")
    still = read_frames(tmp_path / "one.gif", count=8)
    assert (len(still.pixels), still.seconds.tolist()) == (1, [0.0])
    path = film(tmp_path / "film.avi", 20, "mpeg4")
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        data[place : place + 4] = (500).to_bytes(4, "little")
    path.write_bytes(data)
    assert [number_of(frame) for frame in read_frames(path, count=64).pixels] == list(range(20))


def test_the_default_picture_track_is_read(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("ffv1", rate=25) for _ in range(2)]
        for stream, default in zip(streams, (False, True), strict=True):
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
        for stream, shade in zip(streams, (20, 200), strict=True):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")))
            out.mux(stream.encode(None))
    assert abs(read_frames(path, count=1).pixels.float().mean() - 200) < 3
