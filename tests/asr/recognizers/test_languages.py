"""`--language` and `--task translate` on a multilingual Whisper, tiny and random, from the command to the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.asr.recognizers.tiny_speech import multilingual_whisper, seamless_m4t
from tests.asr.tiny_dllm import speech
from tests.media_files import write
from tokenthrift.recognizers import load_transformers
from tokenthrift.transcript import TranscriptToken
from tokenthrift.transcription import Transcriber, load_recognizer, sound
from tokenthrift.transcription.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multilingual_whisper(tmp_path_factory.mktemp("multilingual"))


@pytest.fixture(autouse=True)
def energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The voice is a tone, which Silero VAD does not take for speech."""
    monkeypatch.setattr(sound, "load_vad", lambda: None)


def _tokens(folder: Path, **options: Any) -> tuple[TranscriptToken, ...]:
    model: Any = load_recognizer(folder, **options)
    return tuple(model.transcribe([speech(1.3)])[0].tokens)


def test_languages_by_code_and_name_and_the_likeliest_without_one(folder: Path) -> None:
    found = {code: _tokens(folder, language=code) for code in ("en", "de", "fr")}
    assert len(set(found.values())) == 3, "the prompt changes nothing"
    assert _tokens(folder, language="German") == found["de"]
    model: Any = load_recognizer(folder)
    states = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))
    known = model._vocabulary.languages
    assert {int(row[1]) for row in model._prompts(states)} <= set(known.values())
    assert _tokens(folder) in found.values()
    assert _tokens(folder, language="de", task="translate") != found["de"]


def test_seamless_writes_in_the_language_that_it_is_told(tmp_path: Path) -> None:
    """Without one it would write words of any language."""
    source = seamless_m4t(tmp_path / "seamless")
    audio = [speech(0.6), speech(0.9, 1)]
    german, english, translated = (
        [found.text for found in load_transformers(source, **options).transcribe(audio)]
        for options in ({"language": "deu"}, {"language": "eng"}, {"language": "deu", "task": "translate"})
    )
    assert german != english == translated
    for language in (None, "klingon"):
        with pytest.raises(ValueError, match="wants one of deu, eng"):
            load_transformers(source, language=language)


def test_through_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was asked for decides the text and is part of the journal's key."""
    recording = write(tmp_path / "a.wav", speech(1.3).numpy())
    out = tmp_path / "out"
    command = [str(recording), "--model", str(folder), "--format", "json", "--out-dir", str(out)]
    for options in ({"language": "de"}, {"language": "fr"}, {"language": "de", "task": "translate"}):
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        assert main([*command, *arguments]) == 0
        expected = Transcriber(load_recognizer(folder, **options)).transcribe(recording)[0]
        assert json.loads((out / "a.json").read_text())["text"] == expected.text != ""
    assert main([*command, "--language", "klingon"]) == 2
    assert "knows de, en, fr" in capsys.readouterr().err
