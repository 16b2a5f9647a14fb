"""The benchmark of dLLM-ASR: what it counts, which settings it compares, and what it says of absent test sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.asr.tiny_dllm import speech, tiny_model
from tests.recipes.benchmark_scripts import load_benchmark
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.config import DecodeConfig
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.whisper import states_of


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load_benchmark("dllm_asr")


@pytest.fixture(scope="module")
def model() -> DllmAsr:
    return tiny_model(draft="both", verify_committed=True, verify_threshold=0.3, max_rounds=3)


@pytest.fixture
def calls_seen(model: DllmAsr, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor, DecodeConfig]]:
    """Samples that are encoded, and states, lengths and settings that are decoded, call by call."""
    calls: list[tuple[int, Tensor, Tensor, DecodeConfig]] = []
    samples: list[int] = []
    encode, decode = model.encode, model.decode

    def note_encode(audio: list[Tensor]) -> tuple[Tensor, Tensor]:
        samples.append(len(audio[0]))
        return encode(audio)

    def note_decode(states: Tensor, lengths: Tensor, *, settings: DecodeConfig) -> Any:
        calls.append((samples[-1], states, lengths, settings))
        return decode(states, lengths, settings=settings)

    monkeypatch.setattr(model, "encode", note_encode)
    monkeypatch.setattr(model, "decode", note_decode)
    return calls


def test_two_responses_side_by_side_count_twice(benchmark: Any, model: DllmAsr) -> None:
    systems = benchmark.ablations(model)
    for name, ways in (("diffusion, draft", 2), ("diffusion, draft's confident words", 1), ("diffusion, no draft", 1)):
        _, rounds, forwards = systems[name](speech(1.0))
        assert 0 < forwards == ways * rounds, name


def test_every_row_has_the_settings_of_its_name(benchmark: Any, model: DllmAsr, calls_seen: list[Any]) -> None:
    found = {}
    for name, system in benchmark.ablations(model).items():
        system(speech(0.5))
        settings = calls_seen[-1][-1]
        found[name] = settings.draft, settings.verify_committed, settings.prune
        assert settings.certify == ("ar" if name == "certified" else None)
        limit = None if settings.draft == "none" else model.config.decode.max_rounds
        assert settings.max_rounds == limit, "a draft's few rounds cannot fill a canvas of nothing but MASK"
    assert found == {
        "certified": ("confident", True, "every"),
        "diffusion, no draft": ("none", False, "every"),
        "diffusion, draft length": ("length", False, "every"),
        "diffusion, draft's confident words": ("confident", False, "every"),
        "diffusion, draft": ("both", True, "every"),
        "diffusion, draft, no pruning": ("both", True, "never"),
        "diffusion, draft, gate": ("both", True, "every"),
        "diffusion, no draft, no pruning": ("none", False, "never"),
        "diffusion, draft, 30 s encoder": ("both", True, "every"),
    }


def test_the_encoder_that_is_not_cropped_reads_silence_up_to_30_seconds(
    benchmark: Any, model: DllmAsr, calls_seen: list[Any]
) -> None:
    systems, audio = benchmark.ablations(model), speech(1.3)
    for name in ("diffusion, draft", "diffusion, draft, 30 s encoder"):
        systems[name](audio)
    (cropped, states, lengths, _), (filled, others, same, _) = calls_seen
    assert (cropped, filled) == (len(audio), 30 * 16_000)
    assert lengths.tolist() == same.tolist() == [states_of(len(audio))]
    assert states.shape == others.shape
    assert not torch.allclose(states, others), "the states of the sound saw the silence after it"


def test_absent_sets_are_named(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, public = tmp_path / "data", tmp_path / "public"
    (data / "test" / "asterisk").mkdir(parents=True)
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    assert benchmark.prepare_sets(data, public, ["asterisk", "lj", "typo"]) == ["asterisk"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["lj is left out", "typo is left out"]
    assert "--public" in lines[0]
    assert commands == [], "nothing that is absent could be made"


def test_absent_sets_are_made_where_they_can_be(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a set whose recordings came after the others were made."""
    data, public = tmp_path / "data", tmp_path / "public"
    for name in ("asterisk", "librivox"):
        (data / "test" / name).mkdir(parents=True)
    (public / "lj").mkdir(parents=True)

    def make(command: list[str], **options: Any) -> None:
        assert command[2:] == [str(data), "--lj", str(public / "lj")]
        (data / "test" / "lj").mkdir()

    monkeypatch.setattr(subprocess, "run", make)
    assert benchmark.prepare_sets(data, public, ["lj", "librivox"]) == ["lj", "librivox"]
    assert capsys.readouterr().err == ""


def test_noise_is_decoded_in_fixed_steps(benchmark: Any, calls_seen: list[Any], model: DllmAsr) -> None:
    """As many slots whatever is said, and about one token a step: no draft, no pruning."""
    rounds = []
    for seconds in (1.4, 2.5):
        _, count, forwards = benchmark.fixed_steps(model, slots=24)(speech(seconds))
        settings = calls_seen[-1][-1]
        assert (settings.draft, settings.prune, settings.confidence_threshold) == ("none", "never", 1.0)
        assert count == forwards
        rounds.append(count)
    assert max(rounds) <= 24
    assert min(rounds) > 12


def test_parts_are_of_one_clip(benchmark: Any, model: DllmAsr) -> None:
    threads = torch.get_num_threads()
    try:
        rows = benchmark.parts(model, [(speech(0.5, seed=i), "") for i in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert [(row["threads"], row["batch"]) for row in rows] == [(1, 1), (1, 8), (2, 1), (2, 8)]
    assert all(row["encoder"] > 0 and row["denoising"] >= 0 and row["verifying"] >= 0 for row in rows)


def test_the_same_weights_left_to_right_write_the_certified_text(benchmark: Any, model: DllmAsr) -> None:
    audio = speech(1.1)
    text, _, passes = benchmark.left_to_right(model, decoder_of(model))(audio)
    certified, fewer, forwards = benchmark.ablations(model)["certified"](audio)
    assert text == certified
    assert 0 < fewer == forwards <= passes


def test_in_8_bits_the_certified_text_is_the_one_left_to_right(benchmark: Any) -> None:
    systems = benchmark.in_int8(tiny_model())
    draft, certified, text = (systems[name](speech(1.1)) for name in benchmark.INT8)
    assert draft[0]
    assert certified[0] == text[0]
    assert 0 < certified[2] <= text[2]


def test_a_package_that_is_absent_is_named(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    monkeypatch.setattr(benchmark, "prepare_sets", lambda *arguments: [])
    tiny_model().save_pretrained(tmp_path / "model")
    names = [*benchmark.FASTER]
    arguments = ["--model", str(tmp_path / "model"), "--systems", *names]
    monkeypatch.setattr(sys, "argv", ["dllm_asr.py", *arguments])
    benchmark.main()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is left out: ")[0] for line in said] == names
