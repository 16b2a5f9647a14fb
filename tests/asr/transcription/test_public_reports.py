"""What was reported against other programs that transcribe many files, tried against this one.

| report | there |
| --- | --- |
| m-bain/whisperX 115, 375, 1005; openai/whisper 1396; Vaibhavs10/insanely-fast-whisper 285 | silence ends the run |
| shashikg/WhisperS2T 50, Purfview/whisper-standalone-win 67 | one bad file takes the others with it |
| NVIDIA-NeMo/Speech 10379 | parts of files come out in another order than the manifest's |
| NVIDIA-NeMo/Speech 11984 | an empty line in a manifest ends the run |
| WEIFENG2333/VideoCaptioner 51, tigros/Whisperer 86 | outputs take each other's names, or the recording's |
| FastTrackiverse/fasttrackpy 89, ahmetoner/whisper-asr-webservice 91 | names beyond ASCII |
| m-bain/whisperX 151 | cues of no duration |

Others are elsewhere: SYSTRAN/faster-whisper 1206 (hours that do not fit into memory) in test_memory.py; huggingface/
transformers 47886 (stereo as soundfile gives it) in test_recordings.py; m-bain/whisperX 77, 198 (alignment ends the
run) in test_words.py; SYSTRAN/faster-whisper 1351 (words lost where windows meet) in test_joining.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pysubs2
import pytest

from tests import fake_recognizer
from tests.media_files import voice, write
from tokenthrift.transcription.cli import main

FORMATS = ("txt", "json", "srt", "vtt", "tsv", "karaoke")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(fake_recognizer.save(tmp_path / "model"))


def test_silence_and_a_broken_file_between_others(model: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "d"):
        write(source / f"{name}.wav", voice(1.0))
    write(source / "b.wav", np.zeros(48_000, np.float32))
    (source / "c.wav").write_bytes((source / "a.wav").read_bytes()[:100])
    command = [str(source), "--model", model, "--out-dir", str(out), "--format", *FORMATS, "jsonl"]
    assert main([*command, "--report", str(tmp_path / "page.html")]) == 1
    rows = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["completed", "no speech", "failed", "completed"]
    for suffix in ("txt", "json", "srt", "vtt", "tsv", "karaoke.vtt"):
        assert (out / f"b.{suffix}").is_file(), "no speech is a result, and has its files"
    assert (out / "b.txt").read_text() == (out / "b.srt").read_text() == ""
    assert {path.name for path in out.glob("c.*")} == {"c.json"}
    assert (out / "d.txt").read_text() == "pitch 140\n"


def test_parts_keep_the_order_of_the_manifest_and_empty_lines_do_no_harm(model: str, tmp_path: Path) -> None:
    samples = np.concatenate([voice(2.0, pitch=pitch) for pitch in (100, 200, 300, 400)])
    write(tmp_path / "long.wav", samples)
    parts = [(6.0, 1.5), (0.0, 2.0), (4.0, 1.5), (2.0, 1.0)]
    lines = [json.dumps({"audio_filepath": "long.wav", "offset": a, "duration": b}) for a, b in parts]
    (tmp_path / "m.jsonl").write_text("\n\n \n".join(["", *lines, "", ""]))
    command = [str(tmp_path / "m.jsonl"), "--model", model, "--batch-seconds", "3", "--format", "jsonl"]
    assert main([*command, "--out-dir", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert [row["pred_text"].split()[1] for row in rows] == ["400", "100", "300", "200"]
    assert [row["duration"] for row in rows] == [b for _, b in parts]


def test_names_of_all_kinds_beside_their_recordings(model: str, tmp_path: Path) -> None:
    names = ["1.wav", "1.flac", "zaṭṭə 会議.wav", "a'b\"c$(d).wav", "trailing. .wav", "-x.wav", "été.flac", "x.wav.wav"]
    for name in names:
        write(tmp_path / "in" / name, voice(0.6))
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    assert main([str(tmp_path / "in"), "--model", model, "--format", "srt", "json"]) == 0
    assert all(path.read_bytes() == data for path, data in before.items()), "a recording was replaced"
    assert len(list((tmp_path / "in").glob("*.srt"))) == len(list((tmp_path / "in").glob("*.json"))) == len(names)


def test_every_cue_lasts(model: str, tmp_path: Path) -> None:
    write(tmp_path / "a.wav", np.concatenate([voice(20.0), np.zeros(32_000, np.float32), voice(0.3)]))
    assert main([str(tmp_path / "a.wav"), "--model", model, "--format", "srt", "vtt"]) == 0
    for suffix in ("srt", "vtt"):
        cues = pysubs2.load(str(tmp_path / f"a.{suffix}"))
        assert len(cues) > 1
        assert all(cue.start < cue.end for cue in cues)
        assert all(one.end <= two.start for one, two in zip(cues, cues[1:], strict=False))
