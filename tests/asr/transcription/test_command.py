"""`tokenthrift transcribe` as a user meets it: files, exit codes, what is printed where, and being killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import fake_recognizer
from tests.asr.tiny_dllm import tiny_model
from tests.hub_server import HubServer
from tests.media_files import encode, voice, write
from tokenthrift import cli
from tokenthrift.registry import SYSTEMS, System
from tokenthrift.transcription import FileTranscript
from tokenthrift.transcription import cli as command_line

PROGRAM = """
import os, signal, sys, time
import tests.fake_recognizer
# A shell that runs the tests in the background leaves SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tokenthrift.transcription.cli import main
if "SLOW_DISK" in os.environ:
    os.fsync = lambda descriptor: time.sleep(float(os.environ["SLOW_DISK"]))
print("ready", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(fake_recognizer.save(tmp_path / "model"))


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Three good recordings, one of them in a subfolder, and a manifest."""
    folder = tmp_path / "calls"
    write(folder / "a.wav", voice(3.0, pitch=150))
    (folder / "sub").mkdir()
    encode(folder / "sub" / "b.m4a", voice(2.0), "aac", 44_100)
    write(folder / "long.flac", np.concatenate([voice(20), np.zeros(48_000, np.float32), voice(40, pitch=200)]))
    lines = [{"audio_filepath": "a.wav", "text": "Pitch 150, pitch 150, pitch of 150."}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(*arguments: object) -> int:
    """The command through `tokenthrift`; argparse leaves by SystemExit."""
    try:
        return cli.main(["transcribe", *map(str, arguments)])
    except SystemExit as leave:
        return int(str(leave.code))


def files(folder: Path) -> dict[str, str]:
    """All but the job's own journal and lock."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and ".tokenthrift" not in p.parts)
    return {str(p.relative_to(folder)): p.read_text() for p in found}


def test_all_formats(calls: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(calls, "--model", model, "--out-dir", out, "--format", "txt", "json", "srt", "vtt") == 0
    written = files(out)
    assert set(written) == {
        f"{stem}.{form}" for stem in ("a", "long", "sub/b") for form in ("txt", "json", "srt", "vtt")
    }
    assert written["a.txt"] == "pitch 150 pitch 150 pitch 150\n"
    assert written["long.txt"].count("\n") == 3
    assert written["a.srt"].startswith("1\n00:00:00,000 --> 00:00:03,000\npitch 150")
    assert written["a.vtt"].startswith("WEBVTT\n\n00:00:00.000 --> ")
    data = json.loads(written["long.json"])
    expected = ["file", "status", "seconds", "text", "confidence", "usage", "windows", "track", "segments"]
    assert list(data) == expected
    assert data["status"] == "completed"
    assert data["file"] == str(calls / "long.flac")
    assert data["seconds"] == 63.0
    assert data["usage"] == {key: sum(s["usage"][key] for s in data["segments"]) for key in data["usage"]}
    assert data["text"] == " ".join(segment["text"] for segment in data["segments"])
    for segment in data["segments"]:
        assert "".join(token["text"] for token in segment["tokens"]).strip() == segment["text"]
        assert [word["text"] for word in segment["words"]] == segment["text"].split()
        for token in [*segment["tokens"], *segment["words"]]:
            assert segment["start"] <= token["start"] <= token["end"] <= segment["end"]
            assert 0 <= token["confidence"] <= 1
    printed = capsys.readouterr()
    assert re.search(r"files +3 done, 0 failed", printed.out)
    assert re.search(r"audio +1:08 \(68\.0 s\)", printed.out)
    assert re.search(r"tokens +\d+ used of \d+ native", printed.out)
    assert re.search(r"mean rounds +2\.00 over 5 windows", printed.out)
    assert re.search(r"real-time factor \d", printed.out)
    assert printed.err == ""


def test_a_table_without_out_dir(calls: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(calls / "a.wav", "--model", model, "--references", "--max-rounds", "3") == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.lstrip().startswith("a.wav"))
    assert row.split()[1:5] == ["3.0", "6", "3.0", "14.3"]
    assert "pitch 150 pitch 150" in out
    assert re.search(r"accuracy +WER 14\.3 % \(1 errors in 7 words\), CER .* 1 files with a reference", out)


def test_one_bad_file(calls: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (calls / "bad.mp3").write_text("this is [not] sound")
    (calls / "empty.wav").touch()
    write(calls / "loud.wav", voice(2.0, pitch=660))
    out = tmp_path / "out"
    assert run(calls, "--model", model, "--out-dir", out, "--format", "json") == 1
    written = {name: json.loads(text) for name, text in files(out).items()}
    assert {name: data["status"] for name, data in written.items()} == dict.fromkeys(
        ("a.json", "long.json", "sub/b.json"), "completed"
    ) | dict.fromkeys(("bad.json", "empty.json", "loud.json"), "failed")
    assert written["empty.json"]["error"] == {"type": "AudioError", "message": "empty: a file of 0 bytes"}
    assert written["loud.json"]["error"]["type"] == "RuntimeError"
    printed = capsys.readouterr()
    assert re.search(r"files +3 done, 3 failed", printed.out)
    complaints = printed.err.splitlines()
    assert len(complaints) == 3
    assert complaints[0].startswith(f"failed: {calls}/bad.mp3: not a recording")
    assert complaints[1] == f"failed: {calls}/empty.wav: empty: a file of 0 bytes"
    assert complaints[2].startswith(f"failed: {calls}/loud.wav: transcription failed")


def test_a_name_that_is_not_utf8(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of old systems are transcribed as any other, and their names printed as far as they can be."""
    folder = tmp_path / "in"
    good = write(folder / "a.wav", voice(2.0))
    try:
        shutil.copyfile(good, os.path.join(os.fsencode(folder), b"caf\xe9.wav"))
    except OSError:
        pytest.skip("this file system takes no such names")
    (folder / os.fsdecode(b"na\xefve.wav")).write_text("this is not sound")
    assert run(folder, "--model", model) == 1
    printed = capsys.readouterr()
    assert "caf\ufffd.wav" in printed.out
    assert printed.err.startswith(f"failed: {folder}/na\ufffdve.wav: not a recording")
    out = os.path.join(os.fsencode(tmp_path), b"\xe0")
    assert run(folder, "--model", model, "--out-dir", os.fsdecode(out), "--format", "json", "txt") == 1
    printed = capsys.readouterr()
    assert "2 done, 1 failed" in printed.out
    assert f"{tmp_path}/\ufffd" in printed.out
    named = sorted(name for name in os.listdir(out) if not name.startswith(b"."))
    assert named == [b"a.json", b"a.txt", b"caf\xe9.json", b"caf\xe9.txt", b"na\xefve.json"]
    with open(os.path.join(out, b"caf\xe9.json"), encoding="utf-8") as file:
        assert json.load(file)["file"] == f"{folder}/caf\ufffd.wav"
    (tmp_path / "caf\udce8").mkdir()
    assert run(tmp_path / "caf\udce8", "--model", model) == 2
    assert "caf\ufffd: a folder without recordings" in capsys.readouterr().err


def test_a_text_without_utf8_form_fails_alone(
    calls: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(result: FileTranscript) -> str:
        return "\udce9" if result.path.name == "a.wav" else "fine"

    monkeypatch.setattr(command_line, "WRITERS", {"txt": spoilt})
    assert run(calls, "--model", model, "--out-dir", tmp_path / "out") == 1
    assert files(tmp_path / "out") == {"long.txt": "fine", "sub/b.txt": "fine"}
    assert "a.txt cannot be written: " in capsys.readouterr().err


def test_silence_is_written_as_empty_text(model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "silence.wav", np.zeros(80_000, np.float32))
    assert run(path, "--model", model, "--out-dir", tmp_path / "out", "--format", "txt", "json", "srt", "vtt") == 0
    written = files(tmp_path / "out")
    data = json.loads(written.pop("silence.json"))
    assert (data["status"], data["segments"]) == ("no speech", [])
    assert written == {"silence.txt": "", "silence.srt": "", "silence.vtt": "WEBVTT\n"}


def test_existing_files_are_kept(
    calls: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "a.txt").write_text("mine\n")
    command = [calls, "--model", model, "--out-dir", out, "--format"]
    assert run(*command, "txt") == 0
    assert "2 done, 0 failed, 1 skipped" in capsys.readouterr().out
    assert files(out)["a.txt"] == "mine\n"
    assert run(*command, "txt", "srt") == 0
    assert "3 done, 0 failed, 1 files of others kept" in capsys.readouterr().out
    assert files(out)["a.txt"] == "mine\n"
    monkeypatch.setattr(fake_recognizer.FakeRecognizer, "from_pretrained", None)
    assert run(*command, "txt", "srt") == 0, "with nothing to do the model is not even loaded"
    assert "0 done, 0 failed, 3 skipped" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*command, "txt", "--overwrite") == 0
    assert files(out)["a.txt"].startswith("pitch 150")


def test_an_output_that_cannot_be_written_fails_alone(calls: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "a.txt").mkdir(parents=True)
    assert run(calls, "--model", model, "--out-dir", out, "--overwrite") == 1
    assert set(files(out)) == {"long.txt", "sub/b.txt"}


def test_a_recording_is_never_overwritten(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in" / "x.wav", voice(2.0)).rename(tmp_path / "in" / "x.txt")
    before = path.read_bytes()
    assert run(path, "--model", model, "--out-dir", tmp_path / "in", "--overwrite") == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required"),
        (["{calls}"], "--model"),
        (["{calls}", "--model", "{model}", "--speed", "9"], "unrecognized arguments: --speed"),
        (["{calls}", "--model", "{model}", "--out-dir", "{out}", "--format", "doc"], "invalid choice: 'doc'"),
        (["{calls}", "--model", "{model}", "--format", "jsonl"], "needs --out-dir"),
        (["{calls}", "--model", "{model}", "--shard", "3/2"], "not I/N"),
        (["{calls}", "--model", "{model}", "--language", "en"], "language='en'"),
        (["{calls}", "--model", "{model}", "--task", "translate"], "task='translate'"),
        (["{calls}", "--model", "{model}", "--max-rounds", "0"], "whole number from 1"),
        (["{calls}", "--model", "{model}", "--max-new-tokens", "many"], "whole number from 1"),
        (["{calls}", "--model", "{model}", "--confidence-threshold", "1.5"], "above 0 and at most 1"),
        (["{calls}", "--model", "{model}", "--batch-seconds", "nan"], "a number above 0"),
        (["{calls}", "--model", "{model}", "--threads", "-1"], "whole number from 1"),
        (["{calls}", "--model", "{model}", "--device", "tpu9"], "--device tpu9"),
        (["{calls}", "--model", "{model}", "--device", "cuda:99"], "--device cuda:99"),
        (["{calls}", "--model", "{model}", "--out-dir", "{calls}/a.wav"], "a.wav: File exists"),
        (["{calls}", "--model", "{model}", "--references", "{calls}/a.wav"], "cannot be read"),
        (["{calls}/sub", "--model", "{model}", "--references"], "no manifest.jsonl beside"),
        (["{calls}", "missing.wav", "--model", "{model}"], "missing.wav: no such file"),
        (["{calls}", "--model", "{calls}"], "config.json"),
        (["{calls}", "--model", "./nowhere"], "nowhere"),
    ],
)
def test_wrong_usage(
    arguments: list[str], complaint: str, calls: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, a line that says what is wrong, nothing on stdout and nothing written."""
    places = {"calls": str(calls), "model": model, "out": str(tmp_path / "out")}
    before = files(calls.parent / "model"), sorted(calls.rglob("*"))
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.out == ""
    assert (files(calls.parent / "model"), sorted(calls.rglob("*"))) == before


@pytest.mark.parametrize(("system", "complaint"), [('"radio"', "radio"), ('"deaf"', "does not write down speech")])
def test_a_model_that_cannot_hear(
    system: str,
    complaint: str,
    calls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(SYSTEMS, "deaf", System(name="deaf", model="pathlib:Path"))
    (tmp_path / "config.json").write_text(f'{{"system": {system}}}')
    assert run(calls, "--model", tmp_path) == 2
    assert complaint in capsys.readouterr().err


def test_dllm_asr_through_the_command(calls: Path, tmp_path: Path) -> None:
    """The shipped system, random and tiny: saved, found by its configuration, and run over real files in batches."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    command = [calls, "--model", tmp_path / "tiny", "--format", "json", "vtt", "--max-rounds", "2"]
    assert run(*command, "--out-dir", tmp_path / "one", "--batch-seconds", "0.1") == 0
    assert run(*command, "--out-dir", tmp_path / "many") == 0
    one, many = files(tmp_path / "one"), files(tmp_path / "many")
    assert set(one) == set(many) == {f"{name}.{form}" for name in ("a", "long", "sub/b") for form in ("json", "vtt")}
    for name in one:
        if name.endswith("vtt"):
            assert one[name] == many[name]
            continue
        alone, together = json.loads(one[name]), json.loads(many[name])
        assert alone["text"] == together["text"] != ""
        assert alone["usage"] == together["usage"]
        assert 0 < alone["usage"]["used"] <= alone["usage"]["native"]
        for first, second in zip(alone["segments"], together["segments"], strict=True):
            for token, twin in zip(first["tokens"], second["tokens"], strict=True):
                assert token | {"confidence": 0} == twin | {"confidence": 0}
                assert abs(token["confidence"] - twin["confidence"]) < 1e-3


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for word in ("--out-dir", "--format", "--max-rounds", "--references", "--overwrite", "exit status", "examples"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 82
    assert "no limit" not in text, "a model has limits of its own: transcribe() and its configuration say so"


def test_help_and_wrong_paths_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from tokenthrift.cli import main; status = main(['transcribe', 'missing.wav', '--model', 'x'])\n"
        "assert status == 2; assert 'torch' not in sys.modules; assert 'whisper' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


def environment(**extra: str) -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | extra


def start(*arguments: object, **extra: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.json"))) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_while_writing(model: str, tmp_path: Path) -> None:
    """kill -9 at any moment leaves whole files only, and running again gives what an undisturbed run gives."""
    for index in range(12):
        write(tmp_path / "in" / f"{index:02}.wav", voice(1.5, pitch=100 + 10 * index))
    command = [tmp_path / "in", "--model", model, "--format", "json", "srt", "--out-dir"]
    assert run(*command, tmp_path / "whole") == 0
    whole = files(tmp_path / "whole")
    out = tmp_path / "out"
    for count in (1, 5):
        process = start(*command, out, SLOW_DISK="0.03")
        wait_for_files(out, count, process)
        process.kill()
        process.communicate()
        visible = {name: text for name, text in files(out).items() if not name.startswith(".")}
        assert visible.items() <= whole.items()
    assert run(*command, out) == 0
    assert files(out) == whole, "drafts of the killed processes are gone"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, model: str, tmp_path: Path) -> None:
    """The batch in hand is finished, exit code 130, what is written is whole, and the summary counts it."""
    for index in range(12):
        write(tmp_path / "in" / f"{index:02}.wav", voice(1.5))
    out = tmp_path / "out"
    command = [tmp_path / "in", "--model", model, "--format", "json", "--out-dir", out, "--batch-seconds", "3"]
    process = start(*command, SLOW_DISK="0.1")
    wait_for_files(out, 3, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    written = files(out)
    assert 3 <= len(written) < 12
    assert len(written) % 2 == 0, "two recordings to a batch"
    assert all(json.loads(text)["windows"] == 1 for text in written.values())
    assert f"{len(written)} done" in stdout
    assert not [name for name in written if name.startswith(".")]


def test_a_model_that_exists_at_one_revision_only(
    hub: HubServer, calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(draft="none").save_pretrained(tmp_path / "tiny")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    hub.add("org/tiny", {"README.md": b"# nothing here yet"})
    hub.repositories["org/tiny"].commit(contents, "trial")
    command = [calls / "a.wav", "--model", "org/tiny"]
    assert run(*command) == 2
    assert run(*command, "--revision", "trial") == 0
    assert "1 done, 0 failed" in capsys.readouterr().out
