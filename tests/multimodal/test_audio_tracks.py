"""The right second of the right track and channel, against the timestamps that PyAV wrote."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from tests.media_files import Samples, film, mux_sound, voice, write
from tokenthrift.media.audio import AudioError, read_audio, stream_audio
from tokenthrift.media.audio_track import audio_tracks
from tokenthrift.media.video import read_frames_at

RATE = 16_000


def tone(seconds: float, hertz: float = 400.0) -> Samples:
    time = np.arange(round(seconds * RATE)) / RATE
    return np.asarray(0.5 * np.sin(2 * np.pi * hertz * time), dtype=np.float32)


def talk(
    path: Path,
    parts: Sequence[tuple[float, Samples]],
    codec: str,
    picture: str | None = "mpeg4",
    seconds: float = 6,
    block_size: int = 1024,
) -> Path:
    """A film with sound that starts at the times given, its timestamps written so."""
    with av.open(str(path), "w") as out:
        if picture is not None:
            video: Any = out.add_stream(picture, rate=25)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        rate = 48_000 if codec == "libopus" else RATE
        audio: Any = out.add_stream(codec, rate=rate, layout="mono")
        for number in range(round(seconds * 25) if picture is not None else 0):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            frame.pts = number
            out.mux(video.encode(frame))
        if picture is not None:
            out.mux(video.encode(None))
        size = 960 if codec == "libopus" else block_size
        for start, samples in parts:
            samples = np.repeat(samples, rate // RATE)
            mux_sound(out, audio, samples, start, size)
        out.mux(audio.encode(None))
    return path


def stretches(samples: torch.Tensor) -> list[tuple[float, float]]:
    """Seconds from and to which it is loud, pauses under a tenth of a second ignored."""
    loud = np.flatnonzero(np.abs(samples.numpy()) > 0.1)
    breaks = np.flatnonzero(np.diff(loud) > RATE // 10)
    starts, ends = loud[np.r_[0, breaks + 1]], loud[np.r_[breaks, len(loud) - 1]]
    return [(float(a) / RATE, float(b) / RATE) for a, b in zip(starts, ends, strict=True)]


KINDS = {
    ".mp4": ("aac", "mpeg4"),
    ".mov": ("aac", "mpeg4"),
    ".mkv": ("aac", "mpeg4"),
    ".webm": ("libopus", "libvpx"),
    ".ts": ("mp2", "mpeg2video"),
}


@pytest.mark.parametrize("suffix", KINDS)
def test_sound_that_starts_late_or_pauses_is_heard_at_its_time(suffix: str, tmp_path: Path) -> None:
    codec, picture = KINDS[suffix]
    late = talk(tmp_path / f"late{suffix}", [(2.5, tone(1))], codec, picture)
    assert np.allclose(stretches(read_audio(late)), [(2.5, 3.5)], atol=0.1)
    assert len(read_frames_at(late, 25).pixels) == pytest.approx(150, abs=1)
    gap = talk(tmp_path / f"gap{suffix}", [(0, tone(1)), (4, tone(1))], codec, picture)
    assert np.allclose(stretches(read_audio(gap)), [(0, 1), (4, 5)], atol=0.1)
    assert torch.equal(torch.cat(list(stream_audio(gap))), read_audio(gap))


def test_overlapping_sound_is_trimmed(tmp_path: Path) -> None:
    parts = [(0, tone(1, 300)), (0.6, tone(1, 700))]
    path = talk(tmp_path / "x.mkv", parts, "pcm_s16le", None, block_size=RATE)
    found = read_audio(path)
    assert len(found) == round(1.6 * RATE)
    assert np.allclose([pitch(found[:RATE]), pitch(found[RATE:])], [300, 700], atol=2)


def test_rounded_timestamps_change_no_sample(tmp_path: Path) -> None:
    """Matroska writes milliseconds, and a block of 999 samples lasts 62.44."""
    path = talk(tmp_path / "x.mkv", [(0, tone(2))], "pcm_s16le", None, block_size=999)
    whole = (tone(2)[: 32_000 // 999 * 999] * 32767).astype(np.int16).astype(np.float32) / 32768
    assert np.array_equal(read_audio(path).numpy(), whole)


def test_timestamps_of_centuries_are_refused_before_they_fill_the_memory(tmp_path: Path) -> None:
    path = talk(tmp_path / "x.mkv", [(0, tone(1)), (900_000, tone(1))], "pcm_s16le", None)
    with pytest.raises(AudioError, match="without sound"):
        read_audio(path)


def test_joined_byte_by_byte_is_refused(tmp_path: Path) -> None:
    part = talk(tmp_path / "part.ts", [(0, tone(3))], "mp2", "mpeg2video")
    joined = tmp_path / "joined.ts"
    joined.write_bytes(part.read_bytes() * 2)
    with pytest.raises(AudioError, match="start again"):
        read_audio(joined)


def tracks(path: Path, *parts: tuple[Samples, bool, str]) -> Path:
    with av.open(str(path), "w") as out:
        streams: list[Any] = []
        for _, default, language in parts:
            stream: Any = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
            stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
            stream.metadata["language"] = language
            streams.append(stream)
        for stream, (samples, _, _) in zip(streams, parts, strict=True):
            block = np.asarray(samples[None] * 32767, dtype=np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


def pitch(samples: torch.Tensor) -> float:
    spectrum = np.abs(np.fft.rfft(samples.numpy()))
    return float(spectrum.argmax() * RATE / len(samples))


def test_the_default_track_a_number_and_a_language(tmp_path: Path) -> None:
    path = tracks(tmp_path / "film.mkv", (tone(1, 300), False, "eng"), (tone(1, 700), True, "deu"))
    first, second = audio_tracks(path)
    assert (first.language, first.default, second.number, second.of, second.default) == ("eng", False, 2, 2, True)
    assert str(second) == "track 2 of 2 (deu)"
    for track, hertz in ((None, 700), (1, 300), (2, 700), ("eng", 300), ("de", 700)):
        assert pitch(read_audio(path, track=track)) == pytest.approx(hertz, abs=2)
    with pytest.raises(AudioError, match=r"no audio track 3: it has track 1 of 2 \(eng\); track 2"):
        read_audio(path, track=3)
    with pytest.raises(AudioError, match="no audio track 2: it has track 1 of 1"):
        read_audio(write(tmp_path / "x.wav", tone(0.5)), track=2)


def test_channels_that_cancel_each_other_are_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = voice(9.0)
    path = tmp_path / "turned.wav"
    soundfile.write(path, np.stack([sound, -sound], axis=1), RATE, subtype="FLOAT")
    notes: list[str] = []
    mixed = torch.cat(list(stream_audio(path, notes=notes)))
    assert torch.equal(mixed, torch.from_numpy(sound))
    assert notes == ["its channels cancel each other; the left one was read there"]
    read_audio(path)
    assert "cancel each other" in caplog.text
    assert torch.equal(read_audio(path, channels="right"), torch.from_numpy(-sound))
    with pytest.raises(AudioError, match="no channel 3: it has 2"):
        read_audio(path, channels=3)
    with pytest.raises(AudioError, match="no channel right: it has 1"):
        read_audio(write(tmp_path / "mono.wav", sound), channels="right")


def test_a_mix_is_the_average_where_nothing_is_lost_and_changes_without_a_click(tmp_path: Path) -> None:
    left, right = tone(12, 300), tone(12, 310)
    right[4 * RATE : 8 * RATE] = -left[4 * RATE : 8 * RATE]
    path = tmp_path / "partly.wav"
    soundfile.write(path, np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    mixed = read_audio(path).numpy()
    assert np.allclose(mixed[: 4 * RATE], (left + right)[: 4 * RATE] / 2, atol=1e-6)
    assert np.allclose(mixed[4 * RATE + 100 : 8 * RATE], left[4 * RATE + 100 : 8 * RATE], atol=1e-6)
    assert np.abs(np.diff(mixed)).max() < 0.1


def test_the_sound_of_a_film_and_its_pictures_share_one_clock(tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 50, sound=tone(2))
    assert len(read_audio(path)) / RATE == pytest.approx(len(read_frames_at(path, 25).pixels) / 25, abs=0.1)
