"""Draft and decoder trained over the cached states of a frozen Whisper."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.asr.tiny_dllm import LINES, speech, write_whisper
from tests.recipes.dllm_scripts import run, script
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.autoregressive import decoder_of
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.pretrained import assemble

frozen_encoder, teacher = script("frozen_encoder"), script("teacher")

TEXTS = [line for line in LINES if line.replace(" ", "").isalpha() and line.islower()]
SECONDS = 2.5


def write_states(path: Path, rows: list[torch.Tensor], texts: list[str]) -> None:
    """A shard as `speech_states.py` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offset = torch.tensor(np.cumsum([0, *map(len, rows)]))
    save_file({"audio": torch.cat(rows).half(), "audio_offset": offset}, path, {"texts": json.dumps(texts)})


@pytest.fixture
def training(tmp_path: Path) -> tuple[Any, ...]:
    """Arguments of a training, its steps apart: a Whisper, a model of other weights, and the states of two passes."""
    whisper = write_whisper(tmp_path / "whisper")
    adapter = AdapterConfig(pool=2, stride=1)
    model = assemble(str(whisper), None, vocab_size=120, max_position_embeddings=128, adapter=adapter)
    sounds = [speech(SECONDS, i) for i in range(len(TEXTS))]
    states = [row[:n] for row, n in zip(*model.encode(sounds), strict=True)]
    for name in ("train/00-000", "train/01-000", "dev/00-000"):
        write_states(tmp_path / "states" / f"{name}.safetensors", states, TEXTS)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "start")
    rates = ("--draft-rate", 0.004, "--cross-rate", 0.004, "--decoder-rate", 0.001)
    options = ("--start", tmp_path / "start", "--whisper", whisper, "--seconds", 10, *rates)
    return tmp_path / "states", tmp_path / "out", *options


def test_draft_and_decoder_learn_and_the_encoder_is_whispers(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, frozen_encoder, *training, "--steps", 60, "--every", 20)
    looked = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in looked] == [20, 40, 60]
    for name in ("ctc", "causal", "denoising"):
        assert looked[-1]["train"][name] < 0.95 * looked[0]["train"][name]
        assert looked[-1]["dev"][name] < looked[0]["dev"][name]
    found = DllmAsr.from_pretrained(tmp_path / "out")
    theirs = assemble(
        str(tmp_path / "whisper"), None, vocab_size=120, max_position_embeddings=128, adapter=AdapterConfig()
    )
    pairs = zip(found.encoder.state_dict().values(), theirs.encoder.state_dict().values(), strict=True)
    assert all(torch.equal(one.float(), other.half().float()) for one, other in pairs)
    assert found.config.adapter.pools == (1, 2, 4, 8)
    assert found.transcribe([speech(1.0)])
    with pytest.raises(SystemExit, match="was begun with"):
        run(monkeypatch, frozen_encoder, *training, "--steps", 80, "--seed", 1)


def test_a_stopped_training_ends_as_one_that_went_through(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, *options = training
    options += ["--steps", 4, "--every", 2]
    run(monkeypatch, frozen_encoder, folder, out, *options)
    whole = frozen_encoder.endless_batches

    def stops(*given: Any, **named: Any) -> Iterator[Any]:
        yield from itertools.islice(whole(*given, **named), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frozen_encoder, "endless_batches", stops)
        with pytest.raises(KeyboardInterrupt):
            run(patch, frozen_encoder, folder, tmp_path / "again", *options)
    run(monkeypatch, frozen_encoder, folder, tmp_path / "again", *options)
    through, stopped = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert all(torch.equal(through[name], stopped[name]) for name in through)


def test_a_run_goes_on_to_another_number_of_steps_and_its_last_weights_are_kept(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = itertools.count()
    monkeypatch.setattr(frozen_encoder, "development", lambda model, clips: {"causal": float(next(worse))})
    found = []
    for steps in (2, 4):
        run(monkeypatch, frozen_encoder, *training, "--steps", steps, "--every", 2)
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    looked = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["dev"]["causal"]) for line in looked] == [(2, 0.0), (4, 1.0)]
    changed = {name for name, value in found[0].items() if not torch.equal(value, found[1][name])}
    assert any(name.startswith("draft.") for name in changed)
    assert any("encoder_attn" in name for name in changed)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_decoder_is_whispers(training: tuple[Any, ...], tmp_path: Path, share: float) -> None:
    model = DllmAsr.from_pretrained(tmp_path / "start").float()
    own = {name: value.clone() for name, value in decoder_of(model).state_dict().items()}
    fresh = assemble(
        str(tmp_path / "whisper"), None, vocab_size=120, max_position_embeddings=128, adapter=AdapterConfig()
    )
    theirs = decoder_of(fresh).state_dict()
    frozen_encoder.take_decoder(model, str(tmp_path / "whisper"), share)
    special = [model.vocabulary.mask_id, model.vocabulary.delete_id]
    for name, value in decoder_of(model).state_dict().items():
        expected = share * theirs[name] + (1 - share) * own[name]
        if name == "embed_tokens.weight":
            expected[special] = own[name][special]
        torch.testing.assert_close(value, expected)
    assert torch.equal(model.encoder.conv1.weight, fresh.encoder.conv1.weight)


def test_a_teacher_reads_states_as_it_reads_recordings(training: tuple[Any, ...], tmp_path: Path) -> None:
    model = DllmAsr.from_pretrained(tmp_path / "start").float()
    guide = teacher.Teacher(str(tmp_path / "whisper"), model.vocabulary, 64)
    sounds, texts = [speech(1.0, 0), speech(1.7, 1)], [[1, 2, 3], [4]]
    rows = [guide([sound], [text]) for sound, text in zip(sounds, texts, strict=True)]
    states, lengths = teacher.encode_recordings(guide.encoder, sounds, guide.num_mel_bins)
    torch.testing.assert_close(guide.read(states, lengths, texts), torch.cat(rows), atol=1e-4, rtol=1e-4)


def test_passes_over_different_recordings_end_the_command(
    training: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_states(tmp_path / "states/train/01-000.safetensors", [torch.zeros(4, 8)] * 2, TEXTS[1:3])
    with pytest.raises(SystemExit, match="different recordings"):
        run(monkeypatch, frozen_encoder, *training)
    shutil.rmtree(tmp_path / "states" / "train")
    with pytest.raises(SystemExit, match="no states of"):
        run(monkeypatch, frozen_encoder, *training)
