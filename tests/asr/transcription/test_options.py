"""Options of the command that change how a run goes on, and what a person sees of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests import fake_recognizer
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice, write
from tokenthrift.transcription import Transcriber
from tokenthrift.transcription.cli import main
from tokenthrift.transcription.report import Bar

MAGIC = (
    b"",
    b"RIFF\xff\xff\xff\x7fWAVEfmt ",
    b"fLaC\x00\x00\x00\x22",
    b"OggS\x00\x02",
    b"ID3\x04",
    b"\x00\x00\x00\x20ftyp",
)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(fake_recognizer.save(tmp_path / "model"))


def test_a_dry_run_counts_and_writes_nothing(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.wav", voice(2.0))
    write(tmp_path / "in" / "b.wav", voice(65.0))
    (tmp_path / "in" / "c.wav").write_text("no sound")
    command = [str(tmp_path / "in"), "--model", model, "--out-dir", str(tmp_path / "out"), "--dry-run"]
    assert main(command) == 1
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert rows[1][:2] == ["2.0", "4"]
    assert rows[2][:2] == ["65.0", "130"], "two windows of 30 s and one of 5"
    assert rows[4][:2] == ["67.0", "134"]
    assert "c.wav" in printed.err
    assert not (tmp_path / "out").exists()


def test_neither_page_nor_manifest_replaces_an_input_or_a_file_of_others(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "a.wav", voice(0.6)), tmp_path / "out"
    out.mkdir()
    theirs = out / "transcripts.jsonl"
    theirs.write_text('{"audio_filepath": "../a.wav"}\n')
    before = path.read_bytes(), theirs.read_bytes()
    common = ["--model", model, "--out-dir", str(out), "--format", "txt", "jsonl"]
    for command in (
        [str(path), *common, "--report", str(path)],
        [str(theirs), *common, "--manifest-root", str(tmp_path), "--overwrite"],
        [str(path), *common],
    ):
        assert main(command) == 2
    assert (path.read_bytes(), theirs.read_bytes()) == before
    assert "is of no job" in capsys.readouterr().err
    assert main([str(path), *common, "--overwrite"]) == 0
    assert main([str(path), *common]) == 0, "now it is the job's own"
    assert json.loads(theirs.read_text())["pred_text"] == "pitch 140"


def test_a_page_has_a_place_of_its_own(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the folder of the recordings, nor an output, nor what was said; that is known before the model loads."""
    path, out = write(tmp_path / "in" / "a.wav", voice(0.6)), tmp_path / "out"
    said = tmp_path / "said.jsonl"
    said.write_text('{"audio_filepath": "in/a.wav", "text": "pitch"}\n')
    common = [str(path), "--model", model, "--out-dir", str(out), "--format", "txt", "jsonl"]
    monkeypatch.setattr(FakeRecognizer, "from_pretrained", None)
    for page in (tmp_path / "in", out / "a.txt", out / "transcripts.jsonl", said):
        assert main([*common, "--references", str(said), "--report", str(page), "--overwrite"]) == 2
        assert str(page) in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".tokenthrift"]
    assert said.read_text().startswith("{")


def test_a_list_of_inputs_is_not_overwritten(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.wav", voice(0.6))
    (tmp_path / "a.json").write_text('{"audio_filepath": "a.wav"}\n')
    assert main([str(tmp_path / "a.json"), "--model", model, "--format", "json", "--overwrite"]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == '{"audio_filepath": "a.wav"}\n'


def test_fail_fast_stops_at_the_first_failure(model: str, tmp_path: Path) -> None:
    for name in ("a", "c", "d"):
        write(tmp_path / "in" / f"{name}.wav", voice(0.6))
    (tmp_path / "in" / "b.wav").write_text("no sound")
    command = [str(tmp_path / "in"), "--model", model, "--format", "json", "--out-dir", str(tmp_path / "out")]
    assert main([*command, "--fail-fast", "--batch-seconds", "0.1"]) == 1
    found = {path.stem for path in (tmp_path / "out").glob("*.json")}
    assert "b" in found
    assert "d" not in found
    assert main(command) == 1, "and the next run does the rest"
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {"a", "b", "c", "d"}


def test_low_confidence_is_flagged(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "short.wav", voice(1.0))
    write(tmp_path / "in" / "long.wav", voice(5.0))
    command = [str(tmp_path / "in"), "--model", model, "--format", "json", "--out-dir", str(tmp_path / "out")]
    assert main([*command, "--flag-below", "0.7"]) == 0
    printed = capsys.readouterr()
    assert "1 flagged" in printed.out
    assert "long.wav: a confidence of 0.65, below 0.7" in printed.err
    notes = {path.stem: json.loads(path.read_text()).get("notes") for path in (tmp_path / "out").glob("*.json")}
    assert notes == {"short": None, "long": ["a confidence of 0.65, below 0.7"]}


def test_nothing_is_dropped_below_0(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default may be said."""
    path = write(tmp_path / "a.wav", voice(0.6))
    assert main([str(path), "--model", model, "--drop-below", "0"]) == 0
    assert "pitch 140" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([str(path), "--model", model, "--drop-below", "-0.1"])
    assert "not a number from 0 and at most 1" in capsys.readouterr().err


def test_a_name_cannot_write_lines_or_speak_to_the_terminal(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    write(folder / "a\nfiles 9 done.wav", voice(0.6))
    (folder / "b\x1b[2J\r\nfailed: c.wav").write_text("no sound")
    for command in ([], ["--dry-run"], ["--format", "jsonl", "--out-dir", str(tmp_path / "out")]):
        assert main([str(folder), "--model", model, *command]) == 1
        printed = capsys.readouterr()
        assert not {"\x1b", "\r"} & {*printed.out, *printed.err}
        assert not any(line.startswith("files 9") for line in printed.out.splitlines())
        (failed,) = (line for line in printed.err.splitlines() if "b\\x1b[2J\\r\\nfailed: c.wav" in line)
        assert failed.startswith("failed: ")
    names = [json.loads(line)["audio_filepath"] for line in (tmp_path / "out/transcripts.jsonl").open()]
    assert names[0].endswith("a\nfiles 9 done.wav"), "in a manifest names are what they are"


def test_a_manifest_or_page_that_cannot_be_written_is_a_failure_and_no_wrong_usage(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, page = write(tmp_path / "a.wav", voice(0.6)), tmp_path / "out", tmp_path / "a.wav" / "page.html"
    command = [str(path), "--model", model, "--out-dir", str(out), "--format", "txt", "jsonl"]
    assert main(command) == 0
    (out / "transcripts.jsonl").unlink()
    (out / "transcripts.jsonl").mkdir()
    capsys.readouterr()
    assert main([*command, "--overwrite", "--report", str(page)]) == 1
    printed = capsys.readouterr()
    for name in (out / "transcripts.jsonl", page):
        assert f"failed: {name} cannot be written: " in printed.err
    assert "1 done, 0 failed" in printed.out
    assert (out / "a.txt").read_text() == "pitch 140\n"


def test_plain_lines_where_there_is_no_terminal() -> None:
    """At most one in ten seconds, with what is done, how fast, and what is left."""
    now, out = [0.0], io.StringIO()
    with Bar(10, Console(file=out, force_terminal=False, width=100), lambda: now[0]) as bar:
        for second in (1.0, 12.0, 13.0, 30.0):
            now[0] = second
            bar.advance(1.0, 60.0)
    assert out.getvalue().splitlines() == [
        "2/10 files, 2:00 of audio, RTF 0.1, 0:48 left",
        "4/10 files, 4:00 of audio, RTF 0.12, 0:45 left",
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(MAGIC), st.binary(max_size=300), st.sampled_from([".wav", ".mp3", ".ul", ".ogg", ".mp4"]))
def test_no_bytes_stop_the_job(tmp_path: Path, magic: bytes, data: bytes, suffix: str) -> None:
    """Whatever a file holds it has a status, and the recording after it is transcribed."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(magic + data)
    good = tmp_path / "good.wav"
    if not good.exists():
        write(good, voice(0.6))
    odd, after = Transcriber(FakeRecognizer()).run([path, good])
    assert odd.status in ("completed", "no speech", "failed")
    assert (odd.status == "failed") == bool(odd.error)
    assert bool(odd.error) == bool(odd.error_type)
    assert after.text == "pitch 140"
