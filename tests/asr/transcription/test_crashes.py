"""Crash safety: killed at any moment and run again, the tree is that of a run nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from tests import fake_recognizer
from tests.crashing import forked, killed_at, tree
from tests.media_files import voice, write
from tokenthrift.jobs.journal import FOLDER, BusyError, Journal, locked
from tokenthrift.transcription.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fake_recognizer.save(tmp_path / "model")


def recordings(folder: Path, count: int) -> Path:
    for index in range(count):
        write(folder / ("sub" if index % 3 == 0 else "") / f"{index:02}.wav", voice(0.6, pitch=100 + 10 * index))
    (folder / "broken.wav").write_text("no sound")
    return folder


def test_killed_thirty_times(model: Path, tmp_path: Path) -> None:
    """At random moments: before a draft is whole, between two files of a recording, in the middle of a journal line."""
    source = recordings(tmp_path / "in", 14)
    command = [str(source), "--model", str(model), "--format", "json", "srt", "jsonl", "--out-dir"]
    assert forked(lambda: main([*command, str(tmp_path / "whole")])) == 1
    whole = tree(tmp_path / "whole")
    draw, out, kills, rounds = random.Random(0), tmp_path / "out", 0, 0
    while kills < 32:
        event, torn = draw.randint(1, 14), draw.choice((0, 1, 30))

        def die(event: int = event, torn: int = torn, out: Path = out) -> int:
            killed_at(event, torn)
            return main([*command, str(out)])

        code = forked(die)
        kills += code == -signal.SIGKILL
        assert code in (-signal.SIGKILL, 1)
        visible = {name for name in tree(out) if FOLDER not in name and not Path(name).name.startswith(".")}
        assert all((out / name).read_bytes() == whole[name] for name in visible if name != "transcripts.jsonl")
        if code == 1:
            assert tree(out) == whole
            rounds += 1
            out = tmp_path / f"out-{rounds}"
    assert forked(lambda: main([*command, str(out)])) == 1
    assert tree(out) == whole


def test_a_torn_line_is_ignored_and_the_next_one_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("one", ["a.txt"])
    journal.finish("one", ["a.txt"], {"n": 1})
    journal.finish("two", ["b.txt"], {"n": 2})
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        journal.path.write_bytes(whole[:-cut])
        again = Journal(tmp_path)
        assert again.done("two") is None
        assert (again.done("one") or {})["row"] == {"n": 1}
        again.finish("three", [], {"n": 3})
        assert (Journal(tmp_path).done("three") or {})["row"] == {"n": 3}
        assert (again.done("three") or {})["row"] == {"n": 3}
    for junk in (
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"key": 1}\n',
        b"{" * 100_000 + b"\n",
        b'{"format": 1, "key": "k", "files": 3}\n',
    ):
        journal.path.write_bytes(junk + whole)
        assert (Journal(tmp_path).done("two") or {})["row"] == {"n": 2}


def test_other_options_or_another_model_do_it_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.wav", voice(0.6))
    command = [str(tmp_path / "a.wav"), "--model", str(model), "--out-dir", str(tmp_path / "out")]

    def done(*options: str) -> str:
        assert main([*command, *options]) == 0
        return capsys.readouterr().out.split("files")[1].split("\n")[0].strip()

    assert done() == "1 done, 0 failed"
    assert done().startswith("0 done, 0 failed, 1 skipped")
    assert done("--batch-seconds", "7").startswith("0 done, 0 failed, 1 skipped"), "a batch size changes no text"
    assert done("--max-rounds", "5") == "1 done, 0 failed"
    assert done("--overwrite", "--max-rounds", "5") == "1 done, 0 failed"
    (model / "config.json").write_text('{"system": "fake", "note": "retrained"}')
    assert done("--max-rounds", "5") == "1 done, 0 failed"
    write(tmp_path / "a.wav", voice(0.7))
    assert done("--max-rounds", "5") == "1 done, 0 failed"
    (tmp_path / "out" / "a.txt").unlink()
    assert done("--max-rounds", "5") == "1 done, 0 failed", "what is gone is done again"


def test_a_run_with_other_inputs_forgets_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two jobs in one folder after each other: the first one's files stay its own, to be skipped or done again."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.wav", voice(0.6))

    def done(name: str, *options: str) -> str:
        command = [str(tmp_path / f"{name}.wav"), "--model", str(model), "--out-dir", str(tmp_path / "out")]
        assert main([*command, *options]) == 0
        return capsys.readouterr().out.split("files")[1].split("\n")[0].strip()

    assert done("a") == done("b") == "1 done, 0 failed"
    assert done("a").startswith("0 done, 0 failed, 1 skipped")
    assert done("b").startswith("0 done, 0 failed, 1 skipped")
    assert done("a", "--max-rounds", "5") == "1 done, 0 failed", "and not kept as a file of somebody else"
    journal = (tmp_path / "out" / FOLDER / "journal.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["files"] for line in journal) == [["a.txt"], ["b.txt"]]


def test_another_finder_of_speech_does_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The package `silero-vad` installed, updated and removed between runs: the windows may be others."""
    write(tmp_path / "a.wav", voice(0.6))
    command = [str(tmp_path / "a.wav"), "--model", str(model), "--out-dir", str(tmp_path / "out")]
    package = tmp_path / "packages" / "silero_vad"
    weights = package / "data" / "silero_vad_16k.safetensors"
    weights.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "silero_vad", raising=False)  # what is imported is found first
    monkeypatch.syspath_prepend(package.parent)
    for content in (None, b"one", b"two", None):
        if content is None:
            weights.unlink(missing_ok=True)
        else:
            weights.write_bytes(content)
        for counts in ("1 done, 0 failed", "0 done, 0 failed, 1 skipped"):
            assert main(command) == 0
            assert counts in capsys.readouterr().out


def test_one_writer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second process says who is at work, and a shard and a whole run do not mix."""
    write(tmp_path / "a.wav", voice(0.6))
    out = tmp_path / "out"
    command = [str(tmp_path / "a.wav"), "--model", str(model), "--out-dir", str(out)]
    with locked(out):
        assert main(command) == 2
        assert f"process {os.getpid()} on " in capsys.readouterr().err
        assert main([*command, "--shard", "1/2"]) == 2
    with locked(out, (1, 2)):
        assert main(command) == 2
        assert main([*command, "--shard", "2/3"]) == 2
        assert main([*command, "--shard", "2/2"]) == 0
        with pytest.raises(BusyError), locked(out, (1, 2)):
            pass
    assert main(command) == 0


def test_shards_make_the_tree_of_one_run(model: Path, tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 7)
    command = [str(source), "--model", str(model), "--format", "json", "vtt", "jsonl", "--out-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 1
    for shard in ("2/3", "1/3", "3/3"):
        main([*command, str(tmp_path / "parts"), "--shard", shard])
    assert main([*command, str(tmp_path / "parts")]) == 1, "which only puts the manifest together"
    whole, parts = tree(tmp_path / "whole"), tree(tmp_path / "parts")
    assert {name: parts[name] for name in whole} == whole
    rows = [json.loads(line) for line in whole["transcripts.jsonl"].splitlines()]
    assert [row["audio_filepath"] for row in rows] == [str(p) for p in _inputs(source)]
    assert rows[[row["status"] for row in rows].index("failed")]["error"]["type"] == "AudioError"


def _inputs(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*.wav"))


def test_a_recording_that_was_mended_is_done_by_the_next_run(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its JSON said that it failed; it is the job's own and makes way."""
    (tmp_path / "a.wav").write_text("no sound")
    command = [str(tmp_path / "a.wav"), "--model", str(model), "--out-dir", str(tmp_path / "out"), "--format", "json"]
    for _ in range(2):
        assert main(command) == 1
        assert json.loads((tmp_path / "out" / "a.json").read_text())["status"] == "failed"
        assert "kept" not in capsys.readouterr().out
    write(tmp_path / "a.wav", voice(0.6))
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "a.json").read_text())["status"] == "completed"


def test_a_text_of_other_times_does_not_stay_beside_a_failure(model: Path, tmp_path: Path) -> None:
    """A stale text would look like that of the present file; once this one is mended, all its files are new."""
    path, out = write(tmp_path / "a.wav", voice(0.6)), tmp_path / "out"
    command = [str(path), "--model", str(model), "--out-dir", str(out), "--format", "txt", "json"]
    assert main(command) == 0
    (out / "b.txt").write_text("of somebody")
    path.write_text("no sound")
    assert main(command) == 1
    assert {name.name for name in out.iterdir() if name.is_file()} == {"a.json", "b.txt"}
    write(path, voice(0.6, pitch=280))
    assert main(command) == 0
    assert (out / "a.txt").read_text() == "pitch 280\n"
