"""A CTC model of transformers as the draft of dLLM-ASR."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.asr.recognizers.tiny_speech import moonshine, wav2vec2
from tests.asr.tiny_dllm import speech, tiny_model
from tests.media_files import voice, write
from tokenthrift.budget import TokenUsage
from tokenthrift.dllm_asr.external_draft import draft_of
from tokenthrift.recognizers import load_transformers
from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription.cli import main
from tokenthrift.transcription.engine import JobSpec

USAGE = TokenUsage(native=1, cap=1, used=1)


def test_its_words_are_the_draft(tmp_path: Path) -> None:
    """With a threshold that keeps every word, the text is the other model's; batches equal single recordings."""
    model = tiny_model(draft_threshold=1e-9, verify_threshold=0.0)
    keys = set(model.state_dict())
    own = model.transcribe([speech(1.0)])[0].text
    model.draft_model = load_transformers(wav2vec2(tmp_path / "ctc"))
    audio = [speech(1.0), speech(0.7, 1)]
    together = model.transcribe(audio)
    assert set(model.state_dict()) == keys
    for samples, found in zip(audio, together, strict=True):
        words = [word.text for word in draft_of(model.draft_model.transcribe([samples])[0])]
        assert words, "an empty draft shows nothing"
        assert found.text.startswith(" ".join(words)), "slots after the draft may add to it"
        assert model.transcribe([samples])[0].text == found.text
    assert together[0].text != own


def test_the_job_takes_it(tmp_path: Path) -> None:
    tiny_model(draft_threshold=1e-9, verify_threshold=0.0).save_pretrained(tmp_path / "dllm")
    ctc = str(wav2vec2(tmp_path / "ctc"))
    samples = speech(1.0)
    alone = JobSpec(model=str(tmp_path / "dllm"), device="cpu")
    drafted = replace(alone, draft_model=ctc)
    words = [word.text for word in draft_of(load_transformers(ctc).transcribe([samples])[0])]
    model: Any = drafted.transcriber().model
    assert model.transcribe([samples])[0].text.startswith(" ".join(words))
    assert drafted.options != alone.options
    with pytest.raises(ValueError, match="takes no draft"):
        replace(drafted, model=ctc).transcriber()


def test_words_in_our_characters() -> None:
    tokens = (
        TranscriptToken("Don", 0.9, 0.0, 0.2),
        TranscriptToken("'t,", 0.4, 0.2, 0.4),
        TranscriptToken(" 7", 1, 1, 2),
    )
    word, *rest = draft_of(Transcript("Don't, 7", tokens, USAGE))
    assert (word.text, word.confidence, word.start, word.end) == ("don't", 0.4, 0.0, 0.4)
    assert rest == [], "the draft has no digits"
    assert draft_of(Transcript("", (), USAGE)) == []
    words = (Word("Twenty-One,", 1.0, 2.0, 0.5), Word("don\u2019t", 2.0, 2.5, 0.5), Word("-", 2.5, 2.5, 0.5))
    parted = draft_of(Transcript("Twenty-One, don\u2019t -", (), USAGE, words))
    assert [(word.text, word.start, word.end) for word in parted] == [
        ("twenty", 1.0, 1.5),
        ("one", 1.5, 2.0),
        ("don't", 2.0, 2.5),
    ]


def test_a_model_without_times_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.draft_model = load_transformers(moonshine(tmp_path / "moonshine"))
    with pytest.raises(ValueError, match="needs the times of its words"):
        model.transcribe([speech(1.0)])


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_command_refuses_it_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    """By the configurations: nothing is loaded, no cluster started, no folder made."""
    tiny_model().save_pretrained(tmp_path / "dllm")
    dllm, silent, ctc = str(tmp_path / "dllm"), str(moonshine(tmp_path / "moonshine")), str(wav2vec2(tmp_path / "ctc"))
    path, out = write(tmp_path / "a.wav", voice(1.0)), tmp_path / "out"
    monkeypatch.setattr("tokenthrift.transcription.engine.load_recognizer", None)
    monkeypatch.setattr("tokenthrift.transcription.ray_engine.map_on_ray", None)
    for model, draft, reason in (
        (ctc, ctc, f"--draft-model is for dLLM-ASR; {ctc} takes no draft"),
        (dllm, silent, f"--draft-model {silent} gives no times of its words"),
        (dllm, str(tmp_path / "none"), f"there is no folder '{tmp_path}/none'"),
    ):
        command = [str(path), "--model", model, "--draft-model", draft, "--engine", engine, "--out-dir", str(out)]
        assert main(command) == 2
        assert f"error: {reason}" in capsys.readouterr().err.replace("\n", " ")
        assert not out.exists()


def test_the_command_refuses_it_before_any_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise each recording would fail by itself."""
    tiny_model().save_pretrained(tmp_path / "dllm")
    path, silent = write(tmp_path / "a.wav", voice(1.0)), str(moonshine(tmp_path / "moonshine"))
    command = [str(path), "--model", str(tmp_path / "dllm"), "--device", "cpu", "--draft-model"]
    assert main([*command, silent]) == 2
    assert f"--draft-model {silent} gives no times of its words" in capsys.readouterr().err.replace("\n", " ")
    draft, rate = wav2vec2(tmp_path / "ctc"), '"sampling_rate": 16000'
    extractor = draft / "preprocessor_config.json"
    assert rate in extractor.read_text()
    extractor.write_text(extractor.read_text().replace(rate, '"sampling_rate": 8000'))
    assert main([*command, str(draft)]) == 2
    assert "reads 8000 Hz" in capsys.readouterr().err
