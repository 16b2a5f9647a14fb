"""Tracks, channels and files left out, from the command to the JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests import fake_recognizer
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import Samples, voice, write
from tests.multimodal.test_audio_tracks import tracks
from tokenthrift import cli
from tokenthrift.transcription import Transcriber
from tokenthrift.transcription.subtitles import make_cues

SILENT = np.zeros(32_000, dtype=np.float32)


def spoken(pitch: float) -> Samples:
    return voice(2.0, pitch=pitch)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(fake_recognizer.save(tmp_path / "model"))


def words(text: str) -> set[str]:
    return set(text.split()) - {"pitch"}


def test_the_default_track_is_read_and_the_result_names_it(tmp_path: Path) -> None:
    film = tracks(tmp_path / "film.mkv", (spoken(150), False, "eng"), (spoken(200), True, "deu"))
    for track, number, wanted in ((None, 2, "200"), (1, 1, "150"), ("eng", 1, "150")):
        (result,) = Transcriber(FakeRecognizer(), track=track).transcribe(film)
        assert result.track is not None
        assert (result.error, words(result.text), result.track.number) == (None, {wanted}, number)
        assert result.track.of == 2
        assert result.notes == ()
    (result,) = Transcriber(FakeRecognizer(), track=3).transcribe(film)
    assert result.error is not None
    assert "no audio track 3: it has track 1 of 2 (eng)" in result.error


def test_a_silent_track_beside_one_with_sound_is_named(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    film = tracks(tmp_path / "film.mkv", (SILENT, False, "eng"), (spoken(200), False, "eng"))
    assert cli.main(["transcribe", str(film), "--model", model, "--out-dir", str(tmp_path), "--format", "json"]) == 0
    written = json.loads((tmp_path / "film.json").read_text())
    assert words(written["text"]) == {"200"}
    assert (written["track"]["number"], written["track"]["of"]) == (2, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert "track 1 of 2 (eng) is silent; track 2 of 2 (eng) was read" in told
    (asked,) = Transcriber(FakeRecognizer(), track=1).transcribe(film)
    assert (asked.text, asked.notes) == ("", ())


def test_all_tracks_by_time(tmp_path: Path) -> None:
    late = np.concatenate([np.zeros(80_000, np.float32), spoken(200)])
    film = tracks(tmp_path / "film.mkv", (spoken(150), True, "eng"), (late, False, "eng"))
    (result,) = Transcriber(FakeRecognizer(), track="all").transcribe(film)
    assert [(segment.track, words(segment.text)) for segment in result.segments] == [(1, {"150"}), (2, {"200"})]
    assert result.segments[1].start == pytest.approx(5, abs=0.5)
    assert result.track is None


def test_each_channel_of_a_call_by_itself(tmp_path: Path, model: str) -> None:
    first = np.concatenate([spoken(150), np.zeros(96_000, np.float32), spoken(150)])
    second = np.concatenate([np.zeros(64_000, np.float32), spoken(200), np.zeros(64_000, np.float32)])
    soundfile.write(tmp_path / "call.wav", np.stack([first, second], axis=1), 16_000)
    arguments = ["--model", model, "--out-dir", str(tmp_path), "--format", "json", "txt", "srt", "--channels", "each"]
    assert cli.main(["transcribe", str(tmp_path / "call.wav"), *arguments]) == 0
    segments = json.loads((tmp_path / "call.json").read_text())["segments"]
    assert [(s["channel"], words(s["text"])) for s in segments] == [
        ("left", {"150"}),
        ("right", {"200"}),
        ("left", {"150"}),
    ]
    assert [s["start"] for s in segments] == sorted(s["start"] for s in segments)
    lines = (tmp_path / "call.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["left", "right", "left"]
    assert "right: pitch 200" in (tmp_path / "call.srt").read_text()
    (left,) = Transcriber(FakeRecognizer(), channels="left").transcribe(tmp_path / "call.wav")
    assert words(left.text) == {"150"}
    assert {segment.channel for segment in left.segments} == {None}


def test_channels_that_speak_at_once_keep_their_times_in_subtitles(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "call.wav", np.stack([spoken(150), spoken(200)], axis=1), 16_000)
    (result,) = Transcriber(FakeRecognizer(), channels="each").transcribe(tmp_path / "call.wav")
    cues = make_cues(result.segments)
    assert cues[0].start == cues[1].start
    assert {cue.lines[0].split(":")[0] for cue in cues} == {"left", "right"}


def test_channels_that_cancel_each_other_are_transcribed_and_named(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "call.wav", np.stack([spoken(150), -spoken(150)], axis=1), 16_000)
    (result,) = Transcriber(FakeRecognizer()).transcribe(tmp_path / "call.wav")
    assert words(result.text) == {"150"}
    assert cli.main(["transcribe", str(tmp_path / "call.wav"), "--model", model]) == 0
    assert "cancel each other" in " ".join(capsys.readouterr().err.split())


def test_what_is_left_out_of_a_folder_is_said_and_any_suffix_reads_it(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calls"
    sound = write(folder / "a.flac", spoken(150))
    for name in ("b.mpga", "msg0001"):
        shutil.copy(sound, folder / name)
    out = ["--model", model, "--out-dir"]
    assert cli.main(["transcribe", str(folder), *out, str(tmp_path / "one")]) == 0
    told = capsys.readouterr()
    assert "2 left out:" in told.err
    assert "msg0001" in told.err
    assert "1 done, 0 failed, 2 left out" in told.out
    assert cli.main(["transcribe", str(folder), *out, str(tmp_path / "all"), "--any-suffix"]) == 0
    told = capsys.readouterr()
    assert "3 done, 0 failed\n" in told.out
    assert told.err == ""


@pytest.mark.parametrize("track", ["0", "-1", "a b", ""])
def test_a_track_that_cannot_be_is_wrong_usage(track: str, tmp_path: Path, model: str) -> None:
    with pytest.raises(SystemExit) as leave:
        cli.main(["transcribe", str(write(tmp_path / "a.wav", spoken(150))), "--model", model, "--track", track])
    assert leave.value.code == 2
