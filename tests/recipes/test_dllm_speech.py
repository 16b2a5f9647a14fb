"""The data recipe of dLLM-ASR: synthetic speech and real recordings, on a scale of seconds."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.asr.tiny_dllm import speech
from tests.media_files import encode
from tests.recipes.dllm_scripts import RATE, run, script

sentences, features, recordings, synthesise = map(script, ("sentences", "features", "recordings", "synthesise"))


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"id": str(i), "spoken": f"word {i}", "text": f"word {i}", "split": "train"} for i in range(count)]


def read_speech(path: Path) -> tuple[list[np.ndarray[Any, Any]], list[dict[str, str]]]:
    with np.load(path) as data:
        clips = [data["audio"][a:b] for a, b in pairwise(data["offset"])]
        return clips, json.loads(str(data["rows"]))


def test_a_shard_of_speech_holds_every_clip_that_could_be_spoken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speak(voice: str, text: str, rng: random.Random) -> np.ndarray[Any, Any]:
        if text == "word 2":
            raise soundfile.LibsndfileError(1)
        seconds = {"word 1": 0.1, "word 3": 26.0}.get(text, 0.5)
        return np.linspace(0, 0.1, round(seconds * RATE), dtype=np.float32)

    monkeypatch.setattr(synthesise, "flite", speak)
    job = (7, "slt", rows_of(6), tmp_path, None)
    assert synthesise.make_shard(job).startswith("0007-slt.npz: 3 clips")
    clips, rows = read_speech(tmp_path / "0007-slt.npz")
    assert [row["text"] for row in rows] == ["word 0", "word 4", "word 5"]
    assert [len(clip) for clip in clips] == [RATE // 2] * 3
    assert {int(np.abs(clip).max()) for clip in clips} == {int(0.7 * 32767)}
    assert synthesise.make_shard(job) == "0007-slt.npz: already there"
    assert [p.name for p in tmp_path.iterdir()] == ["0007-slt.npz"]


@pytest.mark.parametrize("engine", ["flite", "espeak-ng"])
def test_engines_speak(engine: str) -> None:
    if shutil.which(engine) is None:
        pytest.skip(f"{engine} is not installed (Debian: apt-get install {engine})")
    speak, voice = (synthesise.flite, "slt") if engine == "flite" else (synthesise.espeak, "en-gb+f2")
    short, long = (speak(voice, text, random.Random(0)) for text in ("no", "one hundred twenty four people"))
    assert short.dtype == np.float32
    assert 0.2 * RATE < len(short) < len(long) < 5 * RATE
    assert np.abs(long).max() > 0.05


def test_recordings_are_split_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"prompt-{i}": f"this is prompt {sentences.cardinal(i)}." for i in range(40)}
    texts |= {"digits/7": "seven", "beep": "[a beep]", "hold": "(hold music)", "activated": "Activated."}
    package = tmp_path / "packages"
    docs, sounds = package / "asterisk-core-sounds-en", package / "asterisk-core-sounds-en-g722" / "en"
    docs.mkdir(parents=True)
    lines = ["; a comment: not a prompt", *(f"{name}: {text}" for name, text in texts.items())]
    (docs / "core-sounds-en.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in texts:
        path = sounds / f"{name}.g722"
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, speech(0.3).numpy(), "g722", RATE, container="g722")
    vox = package / "pocketsphinx-testdata" / "librivox"
    vox.mkdir(parents=True)
    (vox / "transcription").write_text("<s> and mister john dashwood </s> (sense_and)\n")
    soundfile.write(vox / "sense_and.wav", speech(0.5).numpy(), RATE)
    archive = tmp_path / "fsdd.tar"
    with tarfile.open(archive, "w") as tar:
        for speaker in ("theo", "lucas", "george", "nicolas"):
            data = io.BytesIO()
            soundfile.write(data, speech(0.2).numpy()[::2], 8000, format="WAV")
            member = tarfile.TarInfo(f"recordings/3_{speaker}_0.wav")
            member.size = len(data.getvalue())
            data.seek(0)
            tar.addfile(member, data)
    run(monkeypatch, recordings, tmp_path, "--fsdd", archive, "--lj", tmp_path / "nowhere")
    captured = capsys.readouterr()
    assert captured.err == f"--lj: there is no {tmp_path}/nowhere, so the set is left out\n"
    assert not (tmp_path / "test" / "lj").exists()
    found = {}
    for part in ("test/asterisk", "test/asterisk-short", "dev/asterisk", "test/librivox", "test/fsdd"):
        rows = [json.loads(line) for line in (tmp_path / part / "manifest.jsonl").read_text().splitlines()]
        found[part] = {Path(row["audio_filepath"]).stem: row for row in rows}
        for row in rows:
            samples, rate = soundfile.read(tmp_path / part / row["audio_filepath"])
            assert rate == RATE
            assert row["duration"] == pytest.approx(len(samples) / RATE, abs=1e-3)
    clips, train = read_speech(tmp_path / "speech" / "9000-asterisk.npz")
    names = {row["id"]: row["text"] for row in train}
    for name, text in texts.items():
        key, number = name.replace("/", "__"), recordings.hashed(name.replace("/", "__"))
        homes = [part for part in found if key in found[part]] + ["train"] * (key in names)
        if text.startswith(("[", "(")):
            assert homes == []
        elif number % 5 == 0:
            assert homes == ["test/asterisk" if len(text.split()) >= 3 else "test/asterisk-short"]
        else:
            assert homes == ["dev/asterisk" if number % 25 in (1, 6) else "train"]
    assert len(clips) == len(train) > 10
    assert all(text == sentences.normalize(text) for text in names.values())
    assert list(found["test/librivox"]) == ["sense_and"]
    assert sorted(found["test/fsdd"]) == ["3_lucas_0", "3_theo_0"]
    assert sorted(p.name for p in (tmp_path / "speech").iterdir()) == [
        "9000-asterisk.npz",
        "9001-fsdd-george.npz",
        "9002-fsdd-nicolas.npz",
    ]
    assert read_speech(tmp_path / "speech" / "9001-fsdd-george.npz")[1][0]["text"] == "three"
    assert "test/asterisk" in captured.out


def test_transcribed_recordings_are_split_as_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [(f"prompt-{i}", speech(0.3).numpy(), "a prompt") for i in range(8)]
    monkeypatch.setattr(recordings, "asterisk", lambda work: iter(prompts))
    monkeypatch.setattr(recordings, "librivox", lambda work: iter(()))
    monkeypatch.setattr(recordings, "SHARD_CLIPS", 2)
    rows = {"a": "train", "b": "train", "c": "train", "d": "dev", "e": ""}
    voices = tmp_path / "voices"
    (voices / "audio").mkdir(parents=True)
    with (voices / "manifest.jsonl").open("w") as manifest:
        for name, split in rows.items():
            soundfile.write(voices / "audio" / f"{name}.flac", speech(0.3).numpy(), RATE)
            row = {"audio_filepath": f"audio/{name}.flac", "text": f"the letter {name}", "source": "letters"}
            manifest.write(json.dumps(row | ({"split": split} if split else {})) + "\n")
    archive = tmp_path / "voices.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(voices, "voices")
    tree = tmp_path / "LibriSpeech"
    for part in ("train-clean-100", "dev-clean", "test-other"):
        chapter = tree / part / "19" / "198"
        chapter.mkdir(parents=True)
        (chapter / "19-198.trans.txt").write_text("19-198-0000 IT ISN'T FAR\n")
        soundfile.write(chapter / "19-198-0000.flac", speech(0.4).numpy(), RATE)

    run(monkeypatch, recordings, tmp_path / "out", "--speech", archive, "--librispeech", tree)
    shards = sorted(p.name for p in (tmp_path / "out" / "speech").glob("91*"))
    assert shards == ["9100-letters.npz", "9101-letters.npz", "9102-train-clean-100.npz"]
    spoken = [row for name in shards for row in read_speech(tmp_path / "out" / "speech" / name)[1]]
    assert [row["text"] for row in spoken] == ["the letter a", "the letter b", "the letter c", "it isn't far"]
    assert {row["split"] for row in spoken} == {"train"}
    held = {}
    for manifest_path in (tmp_path / "out").glob("[dt]e*/*/manifest.jsonl"):
        for line in manifest_path.read_text().splitlines():
            row = json.loads(line)
            assert len(soundfile.read(manifest_path.parent / row["audio_filepath"])[0]) / RATE == row["duration"]
            place = manifest_path.parent.relative_to(tmp_path / "out").as_posix()
            if "source" in row:
                held[place] = (row["text"], row["source"])
    assert held == {
        "dev/voices": ("the letter d", "letters"),
        "test/voices": ("the letter e", "letters"),
        "dev/librispeech": ("it isn't far", "dev-clean"),
        "test/librispeech": ("it isn't far", "test-other"),
    }
    # The folder is read as its tar file is.
    run(monkeypatch, recordings, tmp_path / "again", "--speech", voices)
    clips = [read_speech(tmp_path / out / "speech" / "9100-letters.npz")[0] for out in ("out", "again")]
    assert all(np.array_equal(one, other) for one, other in zip(*clips, strict=True))

    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(SystemExit, match=r"empty\.tar holds no manifest\.jsonl"):
        run(monkeypatch, recordings, tmp_path / "out", "--speech", tmp_path / "empty.tar")
    with pytest.raises(SystemExit):
        run(monkeypatch, recordings, tmp_path / "out", "--librispeech", tmp_path / "nowhere")
    assert f"there is no {tmp_path}/nowhere" in capsys.readouterr().err


def test_a_tar_file_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("")
    for name in ("../outside.txt", f"{tmp_path}/outside.txt"):
        with tarfile.open(tmp_path / "voices.tar", "w") as tar:
            tar.add(tmp_path / "manifest.jsonl", "voices/manifest.jsonl")
            member = tarfile.TarInfo(name)
            tar.addfile(member)
        with pytest.raises(SystemExit, match="outside of its folder"):
            recordings.speech_folder(tmp_path / "voices.tar", tmp_path / "work")
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        link = tarfile.TarInfo("voices/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
        tar.add(tmp_path / "manifest.jsonl", "voices/manifest.jsonl")
    assert recordings.speech_folder(tmp_path / "linked.tar", tmp_path / "work") == tmp_path / "work/voices"
    assert sorted(path.name for path in (tmp_path / "work/voices").iterdir()) == ["manifest.jsonl"], "no link is made"
    assert not (tmp_path / "outside.txt").exists()
