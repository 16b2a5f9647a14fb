"""What goes in: manifests (hostile ones too), lists, parts of files; and where the output goes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fake_recognizer
from tests.fake_recognizer import FakeRecognizer
from tests.media_files import voice, write
from tokenthrift.jobs.journal import Journal
from tokenthrift.media.audio import read_audio
from tokenthrift.media.files import InputError
from tokenthrift.transcription import Recording, Transcriber, recordings
from tokenthrift.transcription.cli import main
from tokenthrift.transcription.recordings import ManifestError, find_recordings, read_manifest

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "audio_filepath": st.sampled_from(
            ["a.wav", "sub/b.wav", "../a.wav", "/etc/passwd", "", ".", "link/x.wav", "a\0b"]
        )
        | st.text(max_size=30)
        | JSON,
        "offset": JSON,
        "duration": JSON,
        "text": JSON,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("manifests")
    write(base / "in" / "a.wav", voice(3.0))
    write(base / "in" / "sub" / "b.wav", voice(1.0))
    write(base / "secret.wav", voice(1.0))
    (base / "in" / "link").symlink_to(base)
    return base / "in"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        FIELDS.map(lambda fields: json.dumps(fields).encode())
        | JSON.map(lambda data: json.dumps(data).encode())
        | st.binary(max_size=60),
        max_size=5,
    )
)
def test_no_manifest_leads_out_or_raises(folder: Path, lines: list[bytes]) -> None:
    """Whatever is in it: every entry is a recording inside of the folder, or says why it is none."""
    manifest = folder / "fuzz.jsonl"
    manifest.write_bytes(b"\n".join(lines))
    for recording in read_manifest(manifest):
        assert not recording.output.is_absolute()
        assert ".." not in recording.output.parts
        if recording.error is None:
            assert Path(os.path.realpath(recording.path)).is_relative_to(os.path.realpath(folder))
            assert 0 <= recording.offset <= 1e6
            assert recording.duration is None or 0 < recording.duration <= 1e6
        else:
            assert recording.path.name.startswith("fuzz.jsonl, line ")


@pytest.mark.parametrize("name", [".", "./", "sub", "sub/", "sub/..", "sub/../."])
@pytest.mark.parametrize("above", [False, True])
def test_a_folder_is_no_recording(folder: Path, name: str, above: bool) -> None:
    manifest = folder / "folders.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": f"../{folder.name}/{name}" if above else name}))
    (recording,) = read_manifest(manifest, folder.parent)
    assert recording.error is not None
    assert recording.error.endswith("is a folder")


def test_what_a_manifest_says(folder: Path) -> None:
    manifest = folder / "m.jsonl"
    lines = [
        {"audio_filepath": "a.wav", "duration": 3.0, "text": "hello", "speaker": 7},
        {"audio_filepath": "a.wav", "offset": 1.0, "duration": 0.5},
        {"audio_filepath": "a.wav", "offset": 1.0, "duration": 1.5},
        {"audio_filepath": "../secret.wav"},
        {"audio_filepath": "link/secret.wav"},
        {"audio_filepath": str(folder / "sub" / "b.wav")},
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n{oops\n")
    found, _ = find_recordings([str(manifest)])
    assert [str(item.output) for item in found[:3]] == ["a", "a@1.000", "a@1.000.wav"]
    assert [(item.offset, item.duration) for item in found[:3]] == [(0.0, None), (1.0, 0.5), (1.0, 1.5)]
    assert found[0].reference == "hello"
    assert all("lies outside" in (item.error or "") for item in found[3:5])
    assert (found[5].error, str(found[5].output)) == (None, "sub/b")
    assert found[6].path == folder / "m.jsonl, line 8"
    assert (found[6].error or "").startswith("no JSON object")
    allowed, _ = find_recordings([str(manifest)], manifest_root=folder.parent)
    assert [item.error for item in allowed[3:5]] == [None, None]
    assert str(allowed[3].output) == "secret"


def test_a_bad_line_is_named_by_its_number(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table, the complaints, the rows, the page and the plan, and once in each."""
    (folder / "two.jsonl").write_text('{"audio_filepath": 1}\n{"audio_filepath": "a.wav"}\n[]\n')
    monkeypatch.chdir(folder)
    model, out, page = str(fake_recognizer.save(tmp_path / "model")), tmp_path / "out", tmp_path / "page.html"
    for options in ([], ["--dry-run"], ["--out-dir", str(out), "--format", "jsonl", "json", "--report", str(page)]):
        assert main(["two.jsonl", "--model", model, *options]) == 1
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-2:] == [
            "failed: two.jsonl, line 1: audio_filepath is no path",
            "failed: two.jsonl, line 3: no JSON object",
        ]
        assert options[:1] == ["--out-dir"] or "two.jsonl, line 3" in printed.out
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert [row["audio_filepath"] for row in rows] == ["two.jsonl, line 1", "a.wav", "two.jsonl, line 3"]
    assert json.loads((out / "two-line-3.json").read_text())["file"] == "two.jsonl, line 3"
    assert 'data-key="two.jsonl, line 3"' in page.read_text()


def test_a_line_without_end_takes_no_memory(folder: Path) -> None:
    manifest = folder / "long.jsonl"
    manifest.write_bytes(b'{"audio_filepath": "' + b"a" * 3_000_000 + b'"}\n{"audio_filepath": "a.wav"}\n')
    first, second = read_manifest(manifest)
    assert "longer than" in (first.error or "")
    assert second.error is None
    with pytest.raises(ManifestError, match="cannot be read"):
        list(read_manifest(folder / "absent.jsonl"))
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="holds no entry"):
        find_recordings([str(folder / "empty.jsonl")])


def test_a_list_on_standard_input(folder: Path) -> None:
    paths = f"{folder}/a.wav\n\n{folder}/sub/b.wav\n"
    found, _ = find_recordings(["-"], stdin=io.StringIO(paths))
    assert [item.path.name for item in found] == ["a.wav", "b.wav"]
    found, _ = find_recordings(["-"], stdin=io.StringIO("\ufeff" + paths.replace("\n", "\r\n")))
    assert [item.path.name for item in found] == ["a.wav", "b.wav"], "as Windows writes lists"
    with pytest.raises(InputError, match="standard input"):
        find_recordings(["-"], stdin=io.StringIO("\n"))
    with pytest.raises(InputError, match="nowhere"):
        find_recordings(["-"], stdin=io.StringIO("nowhere.wav\n"))


def test_a_list_of_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    write(tmp_path / "a.wav", voice(0.5)).rename(tmp_path / name)
    listed = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + os.fsencode(tmp_path / name) + b"\r\n"), encoding="utf-8")
    found, _ = find_recordings(["-"], stdin=listed)
    assert [item.path.name for item in found] == [name]


def test_two_ways_to_one_folder_do_not_collide_beside_the_recordings(tmp_path: Path) -> None:
    """Below an output folder the two have different folders, beside the recordings they have not."""
    for name, pitch in (("q/a.wav", 140), ("q/a.flac", 280), ("q/a.karaoke.wav", 210)):
        write(tmp_path / name, voice(1.0, pitch=pitch))
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "q/a.karaoke.wav"}\n')
    inputs = [str(tmp_path / "**/*.flac"), str(tmp_path / "q/a.wav"), str(tmp_path / "m.jsonl")]
    model = fake_recognizer.save(tmp_path / "model")
    assert main([*inputs, "--model", str(model), "--format", "txt", "vtt", "karaoke"]) == 0
    texts = {path.name: path.read_text() for path in (tmp_path / "q").glob("*.txt")}
    assert {name: text.split()[1] for name, text in texts.items()} == {
        "a.txt": "280",
        "a.wav.txt": "140",
        "a.karaoke.wav.txt": "210",
    }
    assert len(list((tmp_path / "q").glob("*.vtt"))) == 6


def test_a_folder_by_several_names_has_one_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, from where one stands, and behind a link: one lock, and names that do not collide."""
    for name, pitch in (("a.wav", 140), ("b.wav", 210), ("a.flac", 280)):
        write(tmp_path / "q" / name, voice(0.6, pitch=pitch))
    (tmp_path / "link").symlink_to("q")
    monkeypatch.chdir(tmp_path / "q")
    inputs = [str(tmp_path / "q" / "a.wav"), "b.wav", str(tmp_path / "*nk" / "*.flac")]
    command = [*inputs, "--model", str(fake_recognizer.save(tmp_path / "model")), "--format", "txt"]
    assert main(command) == 0
    texts = {path.name: path.read_text().split()[1] for path in (tmp_path / "q").glob("*.txt")}
    assert texts == {"a.txt": "140", "b.txt": "210", "a.flac.txt": "280"}
    assert len((tmp_path / "q" / ".tokenthrift" / "journal.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(FakeRecognizer, "from_pretrained", None)
    assert main(command) == 0, "all is done"


def test_results_are_in_the_order_of_the_arguments(folder: Path, tmp_path: Path) -> None:
    """Manifests, lists and files in turn; a text without a form in UTF-8 stops no manifest."""
    (folder / "first.jsonl").write_text('{"audio_filepath": "a.wav", "text": "\\ud800 said"}\n')
    (folder / "last.jsonl").write_text('{"audio_filepath": "a.wav", "offset": 2.0}\n')
    inputs = [str(folder / "first.jsonl"), str(folder / "sub"), str(folder / "last.jsonl"), str(folder / "a.wav")]
    command = ["--model", str(fake_recognizer.save(tmp_path / "model")), "--out-dir", str(tmp_path / "out")]
    for _ in range(2):
        assert main([*inputs, *command, "--format", "txt", "jsonl", "--report", str(tmp_path / "page.html")]) == 0
        rows = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
        assert [(Path(row["audio_filepath"]).name, row.get("offset")) for row in rows] == [
            ("a.wav", None),
            ("b.wav", None),
            ("a.wav", 2.0),
            ("a.wav", None),
        ]
        assert rows[0]["text"] == "\ufffd said"


def test_a_name_as_long_as_file_systems_take(tmp_path: Path) -> None:
    name = "\u00e9" * 125 + "a"
    write(tmp_path / "in" / "x.wav", voice(0.6)).rename(tmp_path / "in" / f"{name}.wav")
    out = tmp_path / "out"
    command = [str(tmp_path / "in"), "--model", str(fake_recognizer.save(tmp_path / "model")), "--out-dir", str(out)]
    assert main(command) == 0
    assert [path.name for path in out.glob("*.txt")] == [f"{name}.txt"]
    journal, draft = Journal(out), "." + hashlib.sha256(f"{name}.txt".encode()).hexdigest()[:32]
    journal.begin("key", [f"{name}.txt"])
    (out / f"{draft}.00000000.tmp").touch()
    Journal(out).clean()
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))


def test_names_never_collide(tmp_path: Path) -> None:
    for name in ("x/a.wav", "x/a.flac", "y/a.wav", "y/A.flac"):
        write(tmp_path / name, voice(0.5))
    (tmp_path / "y" / "m.jsonl").write_text('{"audio_filepath": "a.wav"}\n' * 3)
    found, _ = find_recordings([str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path / "y" / "m.jsonl")])
    names = [str(item.output).casefold() for item in found]
    assert len(names) == 7
    assert len(set(names)) == 7


def test_a_file_that_many_lines_name_is_looked_at_once_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    names_of = recordings._output_names

    def counted(folder: str, output: Path) -> set[str]:
        looked.append(str(output))
        return names_of(folder, output)

    monkeypatch.setattr(recordings, "_output_names", counted)
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav"}\n' * 200)
    found, _ = find_recordings([str(tmp_path / "m.jsonl")])
    assert len({item.output for item in found}) == 200
    assert len(looked) < 2 * 200


def test_a_manifest_through_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows come out in the order of the lines, with what was said, and the parts are the parts."""
    lines = [
        {"audio_filepath": "sub/b.wav", "text": "pitch 140"},
        {"audio_filepath": "a.wav", "offset": 1.0, "duration": 2.0},
        {"audio_filepath": "../secret.wav", "text": "no"},
    ]
    manifest = folder / "job.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, out = fake_recognizer.save(tmp_path / "model"), tmp_path / "out"
    assert main([str(manifest), "--model", str(model), "--out-dir", str(out), "--format", "json", "jsonl"]) == 1
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["completed", "completed", "failed"]
    assert rows[0] | {"confidence": 1} == {
        "audio_filepath": f"{folder}/sub/b.wav",
        "duration": 1.0,
        "text": "pitch 140",
        "pred_text": "pitch 140",
        "status": "completed",
        "confidence": 1,
        "native": 4,
        "cap": 4,
        "tokens": 2,
        "new_tokens": 2,
        "rounds": 2,
    }
    assert (rows[1]["offset"], rows[1]["duration"], rows[1]["pred_text"]) == (1.0, 2.0, "pitch 140 pitch 140")
    assert (rows[2]["error"]["type"], rows[2]["confidence"]) == ("ManifestError", None)
    assert rows[0]["confidence"] > 0
    assert "WER 0.0 %" in capsys.readouterr().out


def test_beside_the_recordings(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.wav", voice(1.0))
    write(tmp_path / "in" / "sub" / "b.wav", voice(1.0))
    model = fake_recognizer.save(tmp_path / "model")
    assert main([str(tmp_path / "in"), "--model", str(model), "--format", "srt", "tsv"]) == 0
    found = {str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*") if p.suffix in (".srt", ".tsv")}
    assert found == {"a.srt", "a.tsv", "sub/b.srt", "sub/b.tsv"}
    assert (tmp_path / "in" / "a.tsv").read_text() == "start\tend\ttext\n0\t1000\tpitch 140\n"


def test_a_link_in_the_output_folder_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "sub" / "a.wav", voice(0.5))
    write(tmp_path / "in" / "b.wav", voice(0.5))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    model = fake_recognizer.save(tmp_path / "model")
    assert main([str(tmp_path / "in"), "--model", str(model), "--out-dir", str(tmp_path / "out")]) == 1
    assert "leads out of" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "out" / "b.txt").is_file()


def test_a_part_of_a_file_is_that_part(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.concatenate([voice(2.0, pitch=150), voice(2.0, pitch=300)]))
    model = FakeRecognizer()
    first, second, rest = Transcriber(model).run(
        [Recording(path, duration=2.0), Recording(path, offset=2.0, duration=1.0), Recording(path, offset=2.0)]
    )
    assert (first.text, first.seconds) == ("pitch 150 pitch 150", 2.0)
    assert (second.text, second.seconds, second.offset) == ("pitch 300", 1.0, 2.0)
    assert rest.text == "pitch 300 pitch 300"
    assert len(read_audio(path)) == 64_000


def test_odd_rows_of_a_manifest(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part behind the end is no silence; one that is longer than the file is what there is, and a note says so."""
    rows: list[dict[str, Any]] = [
        {"offset": 10.0, "duration": 1.0},
        {"offset": 0.5, "duration": 100.0},
        {"offset": 0.0, "duration": 0},
        {"offset": -1.0},
        {"duration": -3.0},
        {"offset": float("nan"), "duration": 1.0},
        {"offset": "1"},
        {"offset": 0.0, "duration": 1.0},
        {"offset": 0.0, "duration": 1.0},
    ]
    lines = [
        json.dumps({"audio_filepath": "a.wav", **row, "text": "pitch 140 \u2028"}, ensure_ascii=False) for row in rows
    ]
    (folder / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    model, out = fake_recognizer.save(tmp_path / "model"), tmp_path / "out"
    command = [str(folder / "odd.jsonl"), "--model", str(model), "--out-dir", str(out), "--format", "json", "jsonl"]
    assert main([*command, "--references", str(folder / "odd.jsonl")]) == 1
    found = [json.loads(line) for line in (out / "transcripts.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [row["status"] for row in found] == ["failed", "completed", *["failed"] * 5, "completed", "completed"]
    reasons = [row["error"]["message"] for row in found if row["status"] == "failed"]
    for reason, words in zip(
        reasons,
        ("nothing at 10.000 s", "duration is 0", "offset is not", "duration is not", "NaN is not JSON", "no number"),
        strict=True,
    ):
        assert words in reason
    assert "of 100.0 s that were asked for there are 2.5" in capsys.readouterr().err
    assert main([*command, "--dry-run", "--overwrite"]) == 1
    assert "nothing at 10.000 s" in capsys.readouterr().err
