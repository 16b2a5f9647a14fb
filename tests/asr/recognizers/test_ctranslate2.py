"""Whisper by CTranslate2: a tiny random one, converted here, against the one of transformers that it was made of."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from torch import nn

from tests.asr.recognizers.tiny_speech import wav2vec2, whisper
from tests.asr.tiny_dllm import speech
from tokenthrift.budget import BudgetError, ItemSize
from tokenthrift.config import ConfigError
from tokenthrift.recognizers import whisper_ctranslate2
from tokenthrift.recognizers.ctranslate2_file import read_model_file
from tokenthrift.recognizers.precision import OneByOne
from tokenthrift.recognizers.whisper_ctranslate2 import CTranslate2Recognizer, load_ctranslate2
from tokenthrift.recognizers.whisper_mel import padded_log_mel
from tokenthrift.recognizers.whisper_vocabulary import WhisperVocabulary, is_silence
from tokenthrift.sources import WeightsError
from tokenthrift.transcript import Recognizer
from tokenthrift.transcription import Transcriber, load_recognizer, sound
from tokenthrift.transcription.vad import load_vad
from tokenthrift.whisper import log_mel
from tokenthrift.whisper_frames import mel_filters


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One Whisper as transformers and as CTranslate2 have it."""
    source = whisper(tmp_path_factory.mktemp("whisper"))
    target = tmp_path_factory.mktemp("converted")
    TransformersConverter(str(source), copy_files=["tokenizer.json"]).convert(str(target), force=True)
    fields = json.loads((target / "config.json").read_text())
    size = read_model_file(target / "model.bin").shapes["decoder/embeddings/weight"][0]
    for name in ("suppress_ids", "suppress_ids_begin", "lang_ids"):
        # Transformers' configuration names symbols of the published vocabulary, which is larger.
        fields[name] = [i for i in fields.get(name) or [] if i < size]
    (target / "config.json").write_text(json.dumps(fields))
    return source, target


def _load(folder: Path) -> Any:
    return load_recognizer(folder)


def test_it_writes_what_the_same_weights_write_in_transformers(folders: tuple[Path, Path]) -> None:
    """Texts and confidences; and a batch equals its items."""
    theirs, model = _load(folders[0]), load_ctranslate2(folders[1], trailing_silence=30.0)
    assert isinstance(model, Recognizer)
    audio = [speech(seconds, seed) for seed, seconds in enumerate((0.6, 1.3, 0.6))]
    together, expected = model.transcribe(audio), theirs.transcribe(audio)
    for samples, found, other in zip(audio, together, expected, strict=True):
        assert found.text == other.text != ""
        alone = model.transcribe([samples])[0]
        assert [token.text for token in alone.tokens] == [token.text for token in found.tokens]
        assert alone.usage == found.usage == other.usage
        at = 0.0
        for token, twin in zip(found.tokens, alone.tokens, strict=True):
            assert abs(token.confidence - twin.confidence) < 1e-4
            assert token.start is not None
            assert token.end is not None
            assert at <= token.start <= token.end <= len(samples) / 16_000
            at = token.start


def test_the_encoder_reads_some_silence_after_a_recording_and_no_more(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the budget prices is what is read; a recording near 30 s has less silence, and a batch equals items."""
    model = _load(folders[1])
    assert isinstance(model, CTranslate2Recognizer)
    read: list[int] = []

    def spy(*given: Any) -> Any:
        made = padded_log_mel(*given)
        read.append(made.shape[1] // 2)
        return made

    monkeypatch.setattr(whisper_ctranslate2, "padded_log_mel", spy)
    audio = [speech(0.5), speech(20.0, 1)]
    together = model.transcribe(audio)
    assert sorted(read) == [25 + 1000, 1500] == [found.usage.native for found in together]
    assert [usage.native for usage in model.plan([ItemSize(seconds=0.5), ItemSize(seconds=20.0)])] == sorted(read)
    assert [model.transcribe([samples])[0] for samples in audio] == together
    load_ctranslate2(folders[1], trailing_silence=2.0).transcribe(audio[:1])
    assert read[-1] == 25 + 100
    # Silence is not quieter for being short: the rows that are read are those of the whole 30 s.
    samples = audio[0].numpy()
    assert np.array_equal(padded_log_mel(samples, 80, 1025), padded_log_mel(samples, 80)[:, :2050])


def test_a_checkpoint_that_names_no_symbols_has_null_for_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[1], tmp_path / "null")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"suppress_ids": None, "lang_ids": None}))
    assert _load(folder).transcribe([speech(0.6)])[0].text


def test_limits_and_what_is_refused(folders: tuple[Path, Path]) -> None:
    model: Any = load_recognizer(folders[1], precision="int8")
    assert len(model.transcribe([speech(0.6)], None, {"max_new_tokens": 2})[0].tokens) <= 2
    assert model.plan([ItemSize(seconds=0.6)])[0].native == model.transcribe([speech(0.6)])[0].usage.native
    with pytest.raises(BudgetError, match="max_rounds"):
        model.transcribe([speech(0.6)], None, {"max_rounds": 2})
    with pytest.raises(BudgetError):
        model.transcribe([speech(0.6)], "25%")
    with pytest.raises(ValueError, match="language"):
        load_recognizer(folders[1], language="en")
    with pytest.raises(ValueError, match="translate"):
        load_recognizer(folders[1], task="translate")
    with pytest.raises(ValueError, match="trailing_silence"):
        load_ctranslate2(folders[1], trailing_silence=-1.0)


def test_folders_that_lie_are_refused_before_they_are_loaded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Ids and heads that are not there would be read beyond the end of the tensors."""

    def refused(name: str, change: Callable[[Path], object], error: type[Exception], match: str) -> None:
        folder = shutil.copytree(folders[1], tmp_path / name)
        change(folder)
        with pytest.raises(error, match=match):
            load_recognizer(folder)

    def fields(**changes: object) -> Callable[[Path], object]:
        def write(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return write

    def words(folder: Path) -> None:
        path = folder / "vocabulary.json"
        path.write_text(json.dumps(json.loads(path.read_text())[:-1]))

    refused("ids", fields(suppress_ids=[10**9]), ConfigError, "suppress_ids")
    refused("begin", fields(suppress_ids_begin=["a"]), ConfigError, "suppress_ids_begin")
    refused("heads", fields(alignment_heads=[[0, 99]]), ConfigError, "alignment_heads")

    def scalar(folder: Path) -> None:
        """The matrix of embeddings as one number, in a file whose lengths are all right."""
        data = (folder / "model.bin").read_bytes()
        start = data.index(name := b"decoder/embeddings/weight\0") + len(name)
        rows, columns, kind, size = struct.unpack("<IIBI", data[start + 1 : start + 14])
        number = data[start + 14 :][: size // (rows * columns)]
        after = start + 14 + size
        entry = b"\0" + struct.pack("<BI", kind, len(number)) + number
        (folder / "model.bin").write_bytes(data[:start] + entry + data[after:])

    def nested(folder: Path) -> None:
        (folder / "vocabulary.json").write_text("[" * 100_000)

    refused("scalar", scalar, WeightsError, "Whisper is read")
    refused("nested", nested, ConfigError, "not readable as JSON")
    refused("words", words, ConfigError, "tokens, and the network has")
    refused("no-words", lambda folder: (folder / "vocabulary.json").unlink(), ConfigError, "no vocabulary")
    refused("tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}"), ConfigError, "tokenizer")
    refused("zip", lambda folder: (folder / "model.bin").write_bytes(b"PK\3\4pickle"), WeightsError, "version")


def test_every_cut_and_every_wrong_length_of_the_weights_is_found(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Without reading the tensors."""
    data = (folders[1] / "model.bin").read_bytes()
    whole = read_model_file(folders[1] / "model.bin")
    assert whole.network == "WhisperSpec"
    assert whole.numbers["decoder/num_heads"] == 4
    path = tmp_path / "model.bin"
    for cut in (0, 3, 20, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(WeightsError, match="damaged"):
            read_model_file(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(WeightsError, match="1 bytes more"):
        read_model_file(path)
    name = b"decoder/embeddings/weight\0"
    at = data.index(name) + len(name) + 1
    path.write_bytes(data[:at] + struct.pack("<I", 2**31) + data[at + 4 :])
    with pytest.raises(WeightsError, match="embeddings"):
        read_model_file(path)


def test_the_spectrogram_of_silence_is_filled_in() -> None:
    """Equal to that of the recording with silence behind it."""
    for seconds in (0.02, 1.234, 29.99, 30.0):
        for level in (1.0, 1e-7):
            samples = level * speech(seconds)[: round(16_000 * seconds)]
            whole = torch.nn.functional.pad(samples, (0, 480_000 - len(samples)))
            found = padded_log_mel(samples.numpy(), 80)
            assert np.abs(found - padded_log_mel(whole.numpy(), 80)).max() < 1e-5
            # Two Fourier transforms of 32 bits differ more in bins that hold next to nothing.
            assert np.abs(found - log_mel(whole).numpy()).max() < 1e-4


@pytest.mark.parametrize("bins", [80, 128])
def test_filters_are_those_of_the_published_feature_extractor(bins: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    published = mel_filter_bank(201, bins, 0.0, 8_000, 16_000, norm="slaney", mel_scale="slaney")
    assert np.allclose(mel_filters(bins), published.T, atol=1e-9)


def test_the_job_starts_without_pytorch(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes longer than a short recording; the text is that of a process that has imported it."""
    monkeypatch.setattr(sound, "load_vad", load_vad)  # other tests of this process put energy in its place
    recording = Path(__file__).parents[3] / "samples" / "speech" / "asterisk-vm-tempremoved.flac"
    code = (
        "import sys; from tokenthrift.transcription.cli import main\n"
        "assert main(sys.argv[1:]) == 0; assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    command = [str(recording), "--model", str(folders[1]), "--format", "json", "--out-dir", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *command], check=True, env=environment)
    written = json.loads((tmp_path / "out" / f"{recording.stem}.json").read_text())
    here = Transcriber(_load(folders[1])).transcribe(recording)[0]
    assert (written["text"], written["status"]) == (here.text, "completed")


def test_silence_is_a_likely_one_with_an_unsure_text() -> None:
    assert is_silence([0.2, 0.3], 0.7)
    assert not is_silence([0.2, 0.3], 0.5)
    assert not is_silence([0.9, 0.8], 0.9)


def test_prompts_of_a_multilingual_whisper() -> None:
    """A language is given, or left to be found; older files do not list the timestamps."""
    special = {"<|startoftranscript|>": 1, "<|de|>": 3, "<|fr|>": 4, "<|translate|>": 5, "<|notimestamps|>": 7}
    known = WhisperVocabulary(special, 51_865)
    assert known.prompt(0, "de", "translate") == [1, 3, 5, 7]
    assert known.prompt(0, None, "translate") == [1, None, 5, 7]
    assert known.code("German") == "de"
    with pytest.raises(ValueError, match="this Whisper knows de, fr"):
        known.code("klingon")
    assert 8 in known.never(2)
    assert 51_864 in known.never(2)
    assert WhisperVocabulary(special, 51_864).prompt(0, None, "transcribe") == [1, 7]


def test_linear_layers_in_8_bits_keep_the_text_of_an_item_its_own(tmp_path: Path) -> None:
    """The last bits of a batch would grow in 8 bits, so items go one by one."""
    folder = wav2vec2(tmp_path / "model")
    model: Any = load_recognizer(folder, precision="int8")
    assert isinstance(model, OneByOne)
    assert isinstance(model, Recognizer)
    inside: Any = model.inner
    assert not any(type(module) is nn.Linear for module in inside.model.modules())
    audio = [speech(0.6), 0.01 * speech(0.6, 1), speech(0.6, 2)]
    assert [found.tokens for found in model.transcribe(audio)] == [model.transcribe([a])[0].tokens for a in audio]
    whole: Any = load_recognizer(folder, precision="float32")
    assert model.plan([ItemSize(seconds=0.6)]) == whole.plan([ItemSize(seconds=0.6)])
    plain, small = (m.log_probabilities(audio[:1]) for m in (whole, inside))
    assert 0 < (plain - small).abs().mean() < 0.1 * plain.std()
