"""What a file is and how long, from its headers, against what reading it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media_files import encode, film, voice, write
from tokenthrift.media import audio_track, decoders
from tokenthrift.media.audio import read_audio
from tokenthrift.media.errors import MediaError
from tokenthrift.media.kinds import kind_of
from tokenthrift.media.probe import probe


def test_sounds_by_content_and_length(tmp_path: Path) -> None:
    sound = voice(2.0)
    paths = [
        write(tmp_path / "a.wav", sound),
        write(tmp_path / "a.flac", sound).rename(tmp_path / "message"),
        write(tmp_path / "a.ogg", sound),
        write(tmp_path / "a.mp3", sound),
        encode(tmp_path / "a.m4a", sound, "aac", 44_100),
        encode(tmp_path / "a.aac", sound, "aac", 44_100),
        encode(tmp_path / "a.opus", sound, "libopus", 48_000),
        encode(tmp_path / "a.webm", sound, "libopus", 48_000),
        encode(tmp_path / "a.ulaw", sound, "pcm_mulaw", 8_000, container="mulaw"),
    ]
    for path in paths:
        found = probe(path)
        assert found.kind == "audio"
        assert found.size.seconds == pytest.approx(len(read_audio(path)) / 16_000, abs=0.1)
        assert found.size.frames is None
        assert path.suffix == ".ulaw" or kind_of(path) in ("sound", "film")


def test_pictures_films_and_talking_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 12)).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.mp4")
    silent = film(tmp_path / "silent.mp4", 30)
    talking = film(tmp_path / "talking.mkv", 30, sound=voice(1.5))

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decoders, "decode", refuse)
    monkeypatch.setattr(audio_track, "decode_track", refuse)
    image = probe(tmp_path / "picture.mp4")
    assert (image.kind, image.size.height, image.size.width) == ("image", 12, 20)
    still = probe(silent)
    assert (still.kind, still.size.frames, still.size.height, still.size.width) == ("video", 30, 48, 64)
    assert still.size.seconds == pytest.approx(1.2)
    both = probe(talking)
    assert (both.kind, both.size.frames) == ("talking video", 30)
    assert both.size.seconds == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("data", [b"", b"a letter\n" * 40, np.random.default_rng(3).bytes(9000)])
def test_what_is_nothing_is_an_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(MediaError):
        probe(tmp_path / "x.mp4")
