"""The recipe of real speech: states without pictures, a start by CTC and by made-up sound tokens, a training step."""

from __future__ import annotations

import json
import random
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from torch import nn

from tests.asr.tiny_dllm import write_whisper
from tests.recipes.test_mtsk_recipes import RECIPE, run, script
from tokenthrift.cli import main
from tokenthrift.mtsk import LlamaMtsk, Rates
from tokenthrift.mtsk.training.clips import CachedStates

start = script("speech_start")
TEXTS = ("a hawk brooded on the far corner", "the two men shook hands", "erie is to the north", "that was one night")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings with a manifest, their states of two passes, a tiny Whisper and a tiny Llama of the texts."""
    folder = tmp_path_factory.mktemp("speech")
    rng, lines = np.random.default_rng(0), []
    for i in range(6):
        soundfile.write(folder / f"{i}.flac", rng.normal(0, 0.1, 16_000), 16_000)
        seconds = 31.0 if i == 5 else 1.0
        split = "dev" if i == 4 else "train"
        row = {"audio_filepath": f"{i}.flac", "duration": seconds, "text": TEXTS[i % 4], "split": split}
        lines.append(json.dumps(row) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines))
    write_whisper(folder / "whisper")
    with pytest.MonkeyPatch.context() as patch:
        sizes = ("--vocabulary", 120, "--width", 64, "--layers", 1)
        run(patch, "language_model", folder / "manifest.jsonl", folder / "llama", *sizes)
        for _ in range(2):
            options = ("--whisper", folder / "whisper", "--passes", 2)
            run(patch, "speech_states", folder / "manifest.jsonl", folder / "states", *options)
    return folder


@pytest.fixture(scope="module")
def model(parts: Path) -> LlamaMtsk:
    """After two steps of each lesson, each of which was stopped after the first and went on."""
    options = ("--language-model", parts / "llama", "--whisper", parts / "whisper", "--projector", 16, "--batch", 2)
    with pytest.MonkeyPatch.context() as patch:
        for sounds, texts in ((1, 0), (2, 1), (2, 2)):
            many = ("--ctc-steps", sounds, "--text-steps", texts)
            run(
                patch,
                "speech_start",
                parts / "manifest.jsonl",
                parts / "states/train",
                parts / "start",
                *options,
                *many,
            )
    return LlamaMtsk.from_pretrained(parts / "start")


def test_states_have_no_pictures_and_leave_long_recordings_out(parts: Path) -> None:
    shards = sorted((parts / "states" / "train").glob("*.safetensors"))
    assert [shard.name for shard in shards] == ["00-000.safetensors", "01-000.safetensors"]
    data = CachedStates(shards)
    assert data.texts == [*TEXTS, *TEXTS]
    assert data[0].video is None
    assert CachedStates([parts / "states/dev/00-000.safetensors"]).texts == [TEXTS[0]]


def test_each_lesson_trains_its_own_part_and_goes_on(parts: Path, model: LlamaMtsk) -> None:
    assert torch.load(parts / "start/text.ckpt", weights_only=True)["step"] == 2
    llama = load_file(parts / "llama/model.safetensors")
    found = model.language_model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found["model.embed_tokens.weight"], llama["model.embed_tokens.weight"]), "CTC rests on it"
    assert not torch.equal(found[name], llama[name])
    after_ctc = torch.load(parts / "start/ctc.ckpt", weights_only=True)["model"]
    assert torch.equal(after_ctc[f"language_model.{name}"], llama[name])
    assert torch.equal(model.state_dict()["audio_proj.1.0.weight"], after_ctc["audio_proj.1.0.weight"])


def test_a_faithful_path_collapses_to_its_text(model: LlamaMtsk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "WORST", 0.0)
    vocabulary = model.tokenizer.get_vocab()
    noise = start.Noise(sorted(vocabulary, key=vocabulary.__getitem__))
    for seed, text in enumerate(TEXTS):
        path = noise.path(model.token_ids(text), random.Random(seed))
        assert model.text_of([piece for piece, _ in groupby(path) if piece != start.BLANK]) == text
    monkeypatch.setattr(start, "WORST", 1.0)
    assert any(
        [piece for piece, _ in groupby(noise.path(model.token_ids(TEXTS[0]), random.Random(seed))) if piece]
        != model.token_ids(TEXTS[0])
        for seed in range(5)
    )


@pytest.mark.parametrize("slots", [1, 4])
def test_made_up_tokens_say_by_ctc_what_they_were_made_of(slots: int, model: LlamaMtsk) -> None:
    vocabulary = model.tokenizer.get_vocab()
    noise, turns = start.Noise(sorted(vocabulary, key=vocabulary.__getitem__)), start.rotations(64, 4)[:slots]
    assert torch.allclose(turns @ turns.mT, torch.eye(64).expand_as(turns), atol=1e-5)
    path = [piece for piece in model.token_ids(TEXTS[0]) for piece in (piece, start.BLANK)]
    with torch.no_grad():
        tokens = start.made_tokens(model, path, turns)[None]
        losses = [
            float(start.ctc_loss(model, tokens, torch.tensor([tokens.shape[1]]), [text], turns)) for text in TEXTS
        ]
        assert tokens.shape[1] == -(-len(path) // slots)
        assert losses[0] < 0.5 * min(losses[1:])
        rate = start.FINEST * slots
        assert start.reading_loss(model, TEXTS, rate, start.rotations(64, 4), noise, "seed") > 0


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_the_recipe_goes_on_from_the_start(parts: Path, model: LlamaMtsk, tmp_path: Path) -> None:
    assert model.config.scales == (Rates(audio=4), Rates(audio=16))
    assert isinstance(model.audio_proj, nn.ModuleList)
    config = "model.init_args.config"
    own: dict[str, object] = {f"{config}.language_model": parts / "llama", f"{config}.whisper": parts / "whisper"}
    own |= {f"{config}.projector_hidden_size": 16, "model.init_args.start_from": parts / "start"}
    own |= {f"data.init_args.{part}": parts / "states" / part for part in ("train", "dev")}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "2", "trainer.default_root_dir": tmp_path}
    own |= {"data.init_args.max_frames": 60, "data.init_args.dev_items": 1}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in ("tiny", "speech")]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0
