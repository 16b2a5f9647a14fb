"""What people report of torchcodec, decord, PyAV, torchaudio and torchvision, tried on these readers.

Every test names the report. The independent reading is what was written: a number in every frame, a tone at its time.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from tests.media_files import Samples, film, mux_sound, number_of, numbered, voice
from tokenthrift.media.audio import read_audio, stream_audio
from tokenthrift.media.video import read_frames, read_frames_at, stream_frames

RATE = 16_000
HEVC = {"x265-params": "log-level=none:keyint=3:min-keyint=3"}


def numbers(pixels: torch.Tensor) -> list[int]:
    return [number_of(frame) for frame in pixels]


def test_going_back_after_the_end_gives_the_frame_asked_for(tmp_path: Path) -> None:
    """meta-pytorch/torchcodec#1339, #179: HEVC with a keyframe every 3, near the end first, then early."""
    path = film(tmp_path / "film.mp4", 101, "libx265", rate=10, codec_options=HEVC)
    for wanted in ([99, 35], [100, 0, 80, 79, 81], [35]):
        assert numbers(read_frames(path, indices=wanted).pixels) == wanted
    assert numbers(read_frames(path, seconds=[9.95, 0.5, 3.5]).pixels) == [99, 5, 35]


def test_a_header_of_more_frames_than_there_are_neither_hangs_nor_shifts(tmp_path: Path) -> None:
    """dmlc/decord#373, #375: 30 frames a second by the header, fewer in the file."""
    times = [number * 50 for number in range(60)]
    path = film(tmp_path / "film.mp4", 60, rate=30, milliseconds=times)
    for reader in ("pyav", "decord"):
        frames = read_frames(path, count=1000, reader=reader)
        assert numbers(frames.pixels) == list(range(60))
        assert frames.seconds.tolist() == pytest.approx([time / 1000 for time in times], abs=0.002)


def test_indices_named_again_at_the_end_of_an_avi(tmp_path: Path) -> None:
    """dmlc/decord#195: the last frame several times gave changing results."""
    path = film(tmp_path / "film.avi", 39, "mpeg4")
    wanted = [0, 4, 8, 37, 38, 38, 38, 38]
    for reader in ("pyav", "decord"):
        assert numbers(read_frames(path, indices=wanted, reader=reader).pixels) == wanted


def test_frames_with_b_frames_come_in_the_order_shown(tmp_path: Path) -> None:
    """pytorch/vision#2681: neighbors were exchanged by one backend."""
    path = film(tmp_path / "film.mp4", 40, codec_options={"bf": "3", "b_strategy": "0"})
    assert numbers(torch.cat([piece.pixels for piece in stream_frames(path, chunk=7)])) == list(range(40))


@pytest.mark.parametrize("suffix", [".ts", ".mpg", ".mkv"])
def test_timestamps_that_do_not_start_at_zero(suffix: str, tmp_path: Path) -> None:
    """pytorch/audio#3824, meta-pytorch/torchcodec#1610: programs and streams start at any time."""
    path = tmp_path / f"film{suffix}"
    with av.open(str(path), "w", options={"muxdelay": "0"} if suffix != ".mkv" else {}) as out:
        video: Any = out.add_stream("mpeg2video", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio: Any = out.add_stream("mp2", rate=RATE, layout="mono")
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = 250 + number, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        tone = np.zeros(2 * RATE, np.float32)
        tone[RATE:] = 0.5 * np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE)
        mux_sound(out, audio, tone, 10, 1152)
        out.mux(audio.encode(None))
    assert numbers(read_frames(path, seconds=[1.02]).pixels)[0] in (24, 25)
    loud = np.flatnonzero(np.abs(read_audio(path).numpy()) > 0.2)
    assert loud[0] / RATE == pytest.approx(1, abs=0.1)


def test_a_recording_read_in_pieces_has_every_sample(tmp_path: Path) -> None:
    """meta-pytorch/torchcodec#1601: 1.16534 s at 24 kHz, resampled in pieces, lost a sample."""
    path = tmp_path / "x.wav"
    samples = round(1.16534 * 24_000)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 440 * np.arange(samples) / 24_000), 24_000)
    whole = read_audio(path)
    assert len(whole) == round(samples * RATE / 24_000)
    assert torch.equal(torch.cat(list(stream_audio(path))), whole)


def test_the_samples_that_an_encoder_puts_first_are_not_heard(tmp_path: Path) -> None:
    """WebAudio/web-audio-api#1091, BasisVR/Basis#959: AAC in MP4 came 1,024 samples late."""
    click = np.zeros(RATE, np.float32)
    click[8000:8400] = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(400) / RATE)
    path = film(tmp_path / "film.mp4", 25, sound=click)
    loud = np.flatnonzero(np.abs(read_audio(path).numpy()) > 0.3)
    assert loud[0] == pytest.approx(8000, abs=40)


def test_opening_many_films_keeps_no_memory(tmp_path: Path) -> None:
    """PyAV-Org/PyAV#1117: containers that nobody closed stayed in memory."""
    path = film(tmp_path / "film.mp4", 4, sound=voice(0.2))

    def pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("memory is read from /proc")
    sizes = []
    for _ in range(3):
        for _ in range(12):
            read_frames(path, count=1)
            read_audio(path)
        sizes.append(pages())
    assert (sizes[2] - sizes[1]) * os.sysconf("SC_PAGE_SIZE") < 2_000_000


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("late", [0.0, 0.8])
def test_late_sound_and_the_frames_beside_it_share_one_clock(suffix: str, late: float, tmp_path: Path) -> None:
    """pytorch/vision#1221, #2474: a tone a second, and a frame that says which; the frame on screen at every onset."""
    path = tmp_path / f"film{suffix}"
    codec, sound = ("mpeg2video", "mp2") if suffix == ".ts" else ("libx264", "aac")
    size = 1152 if sound == "mp2" else 1024
    with av.open(str(path), "w") as out:
        video: Any = out.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio: Any = out.add_stream(sound, rate=RATE, layout="mono")
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        onsets = [late + second for second in (0.4, 1.4, 2.4)]
        tones: Samples = np.zeros(3 * RATE, np.float32)
        for onset in onsets:
            at = round((onset - late) * RATE)
            tones[at : at + RATE // 4] = 0.6 * np.sin(2 * np.pi * 500 * np.arange(RATE // 4) / RATE)
        mux_sound(out, audio, tones, late, size)
        out.mux(audio.encode(None))
    heard = np.flatnonzero(np.abs(read_audio(path).numpy()) > 0.2)
    starts = heard[np.r_[0, np.flatnonzero(np.diff(heard) > RATE // 4) + 1]] / RATE
    assert starts == pytest.approx(onsets, abs=0.045)
    shown = numbers(read_frames(path, seconds=[float(start) + 0.02 for start in starts]).pixels)
    assert shown == pytest.approx([onset * 25 for onset in onsets], abs=1.5)
    at_rate = read_frames_at(path, 25)
    assert [number_of(at_rate.pixels[round(float(start) * 25)]) for start in starts] == pytest.approx(shown, abs=1)
