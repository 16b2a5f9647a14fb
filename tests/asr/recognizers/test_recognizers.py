"""Speech models of transformers: tiny random ones of every kind, and the real Whisper tiny.en where it is at hand."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.asr.recognizers.tiny_speech import KINDS, moonshine, wav2vec2, whisper
from tests.asr.tiny_dllm import speech
from tokenthrift.budget import BudgetError, DecodeBudget, ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.evaluation.wer import word_errors
from tokenthrift.media.audio import read_audio
from tokenthrift.recognizers import WhisperRecognizer, load_transformers
from tokenthrift.recognizers.cross_attention import warp
from tokenthrift.recognizers.ctc import collapse
from tokenthrift.recognizers.whisper_vocabulary import WhisperVocabulary
from tokenthrift.sources import WeightsError
from tokenthrift.transcript import Recognizer
from tokenthrift.transcription import load_recognizer

REAL = [Path(name) for name in os.environ.get("TOKENTHRIFT_WHISPER", "no-whisper").split(os.pathsep)]
SAMPLES = Path(__file__).parents[3] / "samples" / "speech"
TIMED = {"wav2vec2", "wav2vec2-layer", "hubert", "wav2vec2_bert", "parakeet_ctc", "parakeet_tdt", "whisper"}
WRITERS = {
    "moonshine",
    "speecht5",
    "granite_speech",
    "qwen2_audio",
    "whisper",
}  # autoregressive: a limit of tokens is honored


@cache
def loaded(kind: str) -> Any:
    with TemporaryDirectory() as folder:
        return load_transformers(KINDS[kind](Path(folder) / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_single_items(kind: str) -> None:
    """Whatever the neighbors and the order; times and confidences are there and in order."""
    model = loaded(kind)
    assert isinstance(model, Recognizer)
    audio = [speech(seconds, seed) for seed, seconds in enumerate((0.6, 1.3, 0.6))]
    together = model.transcribe(audio)
    for samples, found in zip(audio, together, strict=True):
        alone = model.transcribe([samples])[0]
        assert alone.text == found.text != ""
        assert alone.usage == found.usage
        assert [t.text for t in alone.tokens] == [t.text for t in found.tokens]
        assert "".join(token.text for token in found.tokens).strip() == found.text
        seconds, at = len(samples) / 16_000, 0.0
        for token, twin in zip(found.tokens, alone.tokens, strict=True):
            assert 0 <= token.confidence <= 1
            assert abs(token.confidence - twin.confidence) < 1e-4
            assert (token.start is not None) == (kind in TIMED)
            if token.start is not None and token.end is not None:
                assert at <= token.start <= token.end <= seconds + 1e-9
                assert (token.start, token.end) == (twin.start, twin.end)
                at = token.start
    assert together[0].text != together[2].text, "the text says nothing of the audio"


@pytest.mark.parametrize("kind", KINDS)
def test_models_in_half_precision_get_audio_in_theirs(kind: str, tmp_path: Path) -> None:
    """As an accelerator loads them where the checkpoint says so."""
    model: Any = load_transformers(KINDS[kind](tmp_path / kind))
    model.model.bfloat16()
    assert model.transcribe([speech(0.6)])[0].usage.used > 0


@pytest.mark.parametrize("kind", KINDS)
def test_budgets(kind: str) -> None:
    """Plans are exact; what is not honored is refused before anything runs."""
    model = loaded(kind)
    audio = speech(0.6)
    plan = model.plan([ItemSize(seconds=0.6)])[0]
    found = model.transcribe([audio])[0]
    assert (plan.native, plan.used) == (found.usage.native, found.usage.used)
    for budget in ("25%", 10, "5/s"):
        with pytest.raises(BudgetError):
            model.transcribe([audio], budget)
    for limit in ({"max_rounds": 2}, {"confidence_threshold": 0.5}):
        with pytest.raises(BudgetError, match=next(iter(limit))):
            model.transcribe([audio], None, limit)
    if kind in WRITERS:
        assert len(model.transcribe([audio], None, {"max_new_tokens": 3})[0].tokens) <= 3
    else:
        with pytest.raises(BudgetError, match="max_new_tokens"):
            model.transcribe([audio], None, {"max_new_tokens": 3})


def test_odd_audio_is_refused_by_name() -> None:
    model = loaded("wav2vec2")
    for odd in (torch.zeros(2, 16_000), torch.zeros(0), torch.zeros(31 * 16_000), torch.full((16_000,), torch.nan)):
        with pytest.raises(ValueError, match="audio 1"):
            model.transcribe([speech(0.5), odd])
    with_gradient = speech(0.5).clone().requires_grad_()
    assert model.transcribe([with_gradient]) == model.transcribe([speech(0.5)])


def test_language_and_task_are_refused_where_the_model_has_none(tmp_path: Path) -> None:
    for make in (wav2vec2, moonshine, whisper):
        folder = make(tmp_path / make.__name__)
        with pytest.raises(ValueError, match="language"):
            load_transformers(folder, language="en")
        with pytest.raises(ValueError, match="translate"):
            load_transformers(folder, task="translate")


def test_each_row_gets_the_language_that_is_likeliest() -> None:
    recognizer = object.__new__(WhisperRecognizer)
    recognizer.model = SimpleNamespace(config=SimpleNamespace(decoder_start_token_id=1))
    special = {"<|startoftranscript|>": 1, "<|en|>": 2, "<|de|>": 3, "<|fr|>": 4, "<|translate|>": 5}
    recognizer._vocabulary = WhisperVocabulary(special, 51_865)
    recognizer.task, recognizer.language = "translate", None
    logits = torch.zeros(2, 1, 9)
    logits[0, 0, 4], logits[1, 0, 2], logits[:, :, 8] = 1.0, 1.0, 9.0
    recognizer._decode = lambda states, ids, cache: (logits, None)
    assert recognizer._prompts(torch.zeros(2, 4, 8)).tolist() == [[1, 4, 5], [1, 2, 5]]


def test_only_whole_safetensors_are_loaded(tmp_path: Path) -> None:
    """Pickles, missing tensors, foreign code and absurd sizes are refused before anything is allocated."""
    good = wav2vec2(tmp_path / "good")

    def altered(name: str, **changes: object) -> Path:
        folder = shutil.copytree(good, tmp_path / name)
        fields = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    pickled = altered("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin"):
        load_transformers(pickled)
    with pytest.raises(WeightsError, match="not in its"):
        load_transformers(altered("deeper", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000"):
        load_transformers(altered("endless", num_hidden_layers=1_000_000))
    with pytest.raises(ConfigError, match="hidden_size"):
        load_transformers(altered("wide", hidden_size=10**12))
    with pytest.raises(WeightsError, match=r"config.json is of 1\d\d,\d{3},\d{3} numbers"):
        load_transformers(altered("large", hidden_size=2048, intermediate_size=8192))
    filters = shutil.copytree(good, tmp_path / "filters")
    (filters / "preprocessor_config.json").write_text(json.dumps({"feature_size": 10**6}))
    with pytest.raises(ConfigError, match="feature_size is 1000000"):
        load_transformers(filters)
    code = altered("code", model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCTC": "evil.M"})
    (code / "evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    with pytest.raises(ConfigError, match="without code of the repository"):
        load_transformers(code)
    assert not (code / "ran").exists()
    outside = altered("outside")
    (outside / "model.safetensors").unlink()
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../good/model.safetensors"}}')
    with pytest.raises(WeightsError, match="other than safetensors files beside it"):
        load_transformers(outside)
    with pytest.raises(ConfigError, match="bert"):
        load_transformers(altered("text", model_type="bert"))
    for kind in (None, 7, "dia"):
        with pytest.raises(ConfigError, match="model_type"):
            load_transformers(altered(f"kind-{kind}", model_type=kind))


def test_the_job_loads_them_by_the_same_name(tmp_path: Path) -> None:
    assert isinstance(load_recognizer(whisper(tmp_path / "whisper")), WhisperRecognizer)


def test_collapse_keeps_frames_and_the_best_probability() -> None:
    probabilities = torch.full((6, 3), 0.1)
    for frame, (token, p) in enumerate([(0, 0.8), (1, 0.5), (1, 0.7), (0, 0.8), (1, 0.6), (2, 0.8)]):
        probabilities[frame, token] = p
    runs = collapse(probabilities.log(), 0)
    assert [(token, first, last) for token, _, first, last in runs] == [(1, 1, 3), (1, 4, 5), (2, 5, 6)]
    assert [round(p, 3) for _, p, *_ in runs] == [0.7, 0.6, 0.8]


def test_the_warped_path_is_the_cheapest() -> None:
    """Against the plain recursion over cells."""
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (1, 7), (5, 1), (6, 9), (9, 6)):
        cost = rng.normal(size=(n, m))
        best = np.full((n + 1, m + 1), np.inf)
        best[0, 0] = 0
        for i in range(1, n + 1):
            for j in range(1, m + 1):
                best[i, j] = cost[i - 1, j - 1] + min(best[i - 1, j - 1], best[i - 1, j], best[i, j - 1])
        rows, columns = warp(cost)
        assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, n - 1, m - 1)
        steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
        assert steps <= {(0, 1), (1, 0), (1, 1)}
        assert np.isclose(cost[rows, columns].sum(), best[n, m])


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_whisper_writes_what_is_said(folder: Path) -> None:
    """Real weights on real recordings: the words, the same in a batch as alone, and times inside of the recording."""
    if not (folder / "model.safetensors").is_file():
        pytest.skip("TOKENTHRIFT_WHISPER names no folder of Whisper tiny.en, nor of another Whisper behind a colon")
    model = load_transformers(folder)
    names = ("asterisk-conf-otherinparty", "asterisk-agent-pass")
    said = {
        entry["audio_filepath"]: entry["text"]
        for entry in map(json.loads, (SAMPLES / "manifest.jsonl").read_text().splitlines())
    }
    audio = [read_audio(SAMPLES / f"{name}.flac") for name in names]
    together = model.transcribe(audio)
    assert together[1].text == model.transcribe(audio[1:])[0].text
    assert word_errors([said[f"{name}.flac"] for name in names], [t.text for t in together]).rate <= 0.1
    for samples, transcript in zip(audio, together, strict=True):
        words = [token for token in transcript.tokens if token.text.strip().isalpha()]
        lengths = [(word.end or 0.0) - (word.start or 0.0) for word in words]
        assert min(lengths) >= 0
        assert sum(length > 0.05 for length in lengths) >= 0.8 * len(words)
        assert (words[-1].end or 0) <= len(samples) / 16_000


def test_every_limit_of_decoding_is_honored_or_refused() -> None:
    """One that is left at its default is none, whatever limits there are."""
    model = loaded("wav2vec2")
    assert model.transcribe([speech(0.6)], None, DecodeBudget())[0].text
    with pytest.raises(BudgetError, match="hotwords"):
        model.transcribe([speech(0.6)], None, {"hotwords": ("fox",)})
