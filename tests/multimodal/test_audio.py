"""Reading sound: every common format gives the same signal, and every kind of bad file a stated error."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.media_files import Samples, encode, voice, write
from tokenthrift.media.audio import AudioError, read_audio, stream_audio
from tokenthrift.media.errors import MediaError
from tokenthrift.media.probe import probe
from tokenthrift.media.suffixes import MEDIA_SUFFIXES

SOUND = voice(3.0)

FORMATS: dict[str, Callable[[Path], Path]] = {
    "wav": lambda path: write(path, SOUND),
    "24bit.wav": lambda path: write(path, SOUND, subtype="PCM_24"),
    "float.wav": lambda path: write(path, SOUND, subtype="FLOAT"),
    "ulaw.wav": lambda path: write(path, SOUND, subtype="ULAW"),
    "flac": lambda path: write(path, SOUND),
    "ogg": lambda path: write(path, SOUND),
    "mp3": lambda path: write(path, SOUND),
    "aiff": lambda path: write(path, SOUND),
    "8k-stereo.wav": lambda path: encode(path, SOUND, "pcm_s16le", 8_000, layout="stereo"),
    "48k.flac": lambda path: encode(path, SOUND, "flac", 48_000),
    "44k-stereo.mp3": lambda path: encode(path, SOUND, "libmp3lame", 44_100, layout="stereo"),
    "m4a": lambda path: encode(path, SOUND, "aac", 44_100, layout="stereo"),
    "aac": lambda path: encode(path, SOUND, "aac", 44_100),
    "mp4": lambda path: encode(path, SOUND, "aac", 48_000, video=True),
    "webm": lambda path: encode(path, SOUND, "libopus", 48_000),
    "opus": lambda path: encode(path, SOUND, "libopus", 48_000),
    "mkv": lambda path: encode(path, SOUND, "pcm_s24le", 22_050, video=True),
    "g722": lambda path: encode(path, SOUND, "g722", 16_000),
    "amr": lambda path: encode(path, SOUND, "libopencore_amrnb", 8_000),
    "ulaw": lambda path: encode(path, SOUND, "pcm_mulaw", 8_000, container="mulaw"),
    "sln16": lambda path: encode(path, SOUND, "pcm_s16le", 16_000, container="s16le"),
}


def correlation(samples: torch.Tensor) -> float:
    """Likeness of the first harmonics to the original, whatever delay (up to 0.1 s) and gain the codec added."""
    length = 2**17
    spectra = [np.fft.rfft(signal, length) for signal in (samples.numpy(), SOUND)]
    # AMR and mu-law carry 300 to 3,400 Hz, and codecs of low rate change phases above.
    for spectrum in spectra:
        spectrum[int(1_000 / 16_000 * length) :] = 0
        spectrum[: int(250 / 16_000 * length)] = 0
    cross = np.fft.irfft(spectra[0] * np.conj(spectra[1]), length)
    energy = [np.sum(np.fft.irfft(spectrum, length) ** 2) for spectrum in spectra]
    return float(max(cross[:1600].max(), cross[-1600:].max()) / np.sqrt(energy[0] * energy[1]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_signal(name: str, tmp_path: Path) -> None:
    samples = read_audio(FORMATS[name](tmp_path / f"clip.{name}"))
    assert samples.dtype == torch.float32
    assert samples.ndim == 1
    assert abs(len(samples) / 16_000 - 3.0) < 0.08
    assert correlation(samples) > (0.7 if name == "amr" else 0.95)


def test_sixteen_kilohertz_is_bit_exact(tmp_path: Path) -> None:
    samples = read_audio(write(tmp_path / "clip.wav", SOUND, subtype="FLOAT"))
    assert np.array_equal(samples.numpy(), SOUND)


def test_whole_numbers_of_64_bits(tmp_path: Path) -> None:
    """As some laboratories' WAV files have them; two channels."""
    whole = np.repeat((SOUND.astype(np.float64) * 2**62).astype("<i8")[:, None], 2, 1).tobytes()
    form = struct.pack("<HHIIHH", 1, 2, 16_000, 16_000 * 16, 16, 64)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(whole))
    (tmp_path / "x.wav").write_bytes(b"RIFF" + struct.pack("<I", len(head) + len(whole)) + head + whole)
    assert torch.allclose(read_audio(tmp_path / "x.wav"), torch.from_numpy(SOUND).float() / 2, atol=1e-6)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = voice(1.0, pitch=120), voice(1.0, pitch=200)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    assert np.allclose(read_audio(tmp_path / "two.wav").numpy(), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 96_000])
def test_resampling_keeps_a_tone(rate: int, tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    samples = read_audio(write(tmp_path / "tone.wav", tone, rate, subtype="FLOAT")).numpy()
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(samples)) / 16_000)
    assert abs(len(samples) - 32_000) <= 1
    assert np.abs(samples - wanted)[200:-200].max() < 1e-3


@settings(deadline=None, max_examples=15)
@given(rate=st.integers(4_000, 50_000), seconds=st.floats(0.001, 9.0))
def test_length_follows_the_rate(tmp_path_factory: pytest.TempPathFactory, rate: int, seconds: float) -> None:
    count = max(1, round(rate * seconds))
    path = write(tmp_path_factory.mktemp("rates") / "clip.wav", voice(9.0, rate)[:count], rate)
    assert abs(len(read_audio(path)) - count * 16_000 / rate) <= 1


def test_pieces_join_to_the_whole_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "long.wav", np.tile(SOUND, 40), 44_100)
    pieces = list(stream_audio(path))
    assert max(len(piece) for piece in pieces) <= 5 * 16_000
    assert torch.equal(torch.cat(pieces), read_audio(path))


def test_peak_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    """Six minutes of 44.1 kHz stereo are 127 MB as floats; the stream of them must cost a small part of that."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 44_100, 2) as file:
        minute = np.tile(voice(1.0, 44_100)[:, None], (60, 2))
        for _ in range(6):
            file.write(minute)
    program = (
        "import resource, sys; from tokenthrift.media.audio import stream_audio\n"
        "next(stream_audio(sys.argv[1])); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "seconds = sum(len(piece) for piece in stream_audio(sys.argv[1])) / 16000\n"
        "print(round(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True, check=True
    )
    seconds, growth_kib = map(int, out.stdout.split())
    assert seconds == 360
    assert growth_kib < 40_000


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def noise() -> Samples:
    return np.asarray(np.random.default_rng(0).normal(size=20 * 16_000) * 0.1, dtype=np.float32)


@pytest.mark.parametrize("name", ["clip.wav", "clip.aiff", "clip.flac", "clip.mp3"])
def test_cut_short(name: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cut short"):
        read_audio(cut(write(tmp_path / name, noise())))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("clip.m4a", "aac", {}), ("clip.mp4", "aac", {"movflags": "faststart"}), ("clip.webm", "libopus", {})],
)
def test_cut_short_containers(name: str, codec: str, options: dict[str, str], tmp_path: Path) -> None:
    path = encode(tmp_path / name, noise(), codec, 48_000, options=options)
    assert abs(len(read_audio(path)) - 320_000) < 2_000
    with pytest.raises(AudioError, match="cut short|damaged"):
        read_audio(cut(path))


@pytest.mark.parametrize("name", ["clip.ogg", "clip.g722"])
def test_cut_short_without_a_stated_length_is_what_is_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    whole = write(path, noise()) if name.endswith("ogg") else encode(path, noise(), "g722", 16_000)
    assert 10 < len(read_audio(cut(whole))) / 16_000 < 13


@pytest.mark.parametrize("name", ["clip.flac", "clip.mp3", "clip.webm"])
def test_damage_in_the_middle(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("webm"):
        encode(path, noise(), "libopus", 48_000)
    else:
        write(path, noise())
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 8] = bytes(len(data) // 8)
    path.write_bytes(data)
    with pytest.raises(AudioError, match="corrupt"):
        read_audio(path)


def test_a_recorder_that_lost_power(tmp_path: Path) -> None:
    """Its header states length 0; a pipe's states the largest number there is. Both hold sound."""
    path = write(tmp_path / "clip.wav", SOUND)
    header = path.read_bytes()
    for size in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
        path.write_bytes(header[:4] + size + header[8:40] + size + header[44:])
        assert len(read_audio(path)) == len(SOUND)


def test_files_that_hold_no_sound(tmp_path: Path) -> None:
    def refused(name: str, data: bytes, reason: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AudioError, match=reason) as caught:
            read_audio(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert str(tmp_path) not in caught.value.reason

    refused("empty.wav", b"", "empty: a file of 0 bytes")
    refused("text.wav", b"This is a letter, not a recording.\n" * 200, "not a recording")
    refused("text.mp3", b"This is a letter, not a recording.\n" * 200, "not a recording")
    for suffix in ("wav", "flac", "mp3", "m4a", "ogg", "aac"):
        noise = np.random.default_rng(1).bytes(20_000)
        refused(f"random.{suffix}", noise, "not a recording|no audio|nothing in it|empty")
    with pytest.raises(AudioError, match="empty: no audio samples"):
        read_audio(write(tmp_path / "none.wav", SOUND[:0]))
    with pytest.raises(AudioError, match="No such file"):
        read_audio(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match="directory"):
        read_audio(tmp_path)


def test_a_video_without_sound(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "mute.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no audio track"):
        read_audio(tmp_path / "mute.mp4")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_no_sound(bad: float, tmp_path: Path) -> None:
    samples = SOUND.copy()
    samples[20_000] = bad
    with (
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
        pytest.raises(AudioError, match="NaN, infinite or huge samples"),
    ):
        read_audio(write(tmp_path / "clip.wav", samples, subtype="FLOAT"))


@pytest.mark.parametrize(
    ("name", "wrong"), [("clip.mp3", "clip.wav"), ("clip.wav", "clip.mp3"), ("clip.flac", "clip.raw")]
)
def test_the_wrong_suffix_does_not_matter(name: str, wrong: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, SOUND)
    right = read_audio(path)
    assert torch.equal(read_audio(path.rename(tmp_path / wrong)), right)


def test_very_short_recordings(tmp_path: Path) -> None:
    assert len(read_audio(write(tmp_path / "one.wav", SOUND[:1]))) == 1
    assert 79 <= len(read_audio(write(tmp_path / "few.wav", SOUND[:40], 8_000))) <= 81


def test_odd_names(tmp_path: Path) -> None:
    for name in ("a b.wav", "100%.mp3", "http:x.mp3", "[1].m4a", "naïve-ü.wav"):
        path = (
            write(tmp_path / name, SOUND) if not name.endswith("m4a") else encode(tmp_path / name, SOUND, "aac", 16_000)
        )
        assert len(read_audio(path)) > 40_000


def test_the_list_of_suffixes() -> None:
    assert {".wav", ".mp3", ".m4a", ".mp4", ".webm", ".g722", ".opus", ".mkv", ".flv"} <= MEDIA_SUFFIXES
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in MEDIA_SUFFIXES)
    assert not {".txt", ".jsonl", ".ts", ".gif", "."} & MEDIA_SUFFIXES


def test_a_pipe_and_a_device_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    readers: tuple[Callable[[Path], object], ...] = (read_audio, probe)
    for path in (tmp_path / "pipe.wav", Path("/dev/zero")):
        for read in readers:
            with pytest.raises(MediaError, match="a pipe, a socket or a device"):
                read(path)
