"""The recipes around published language models: two steps each, with tiny random weights in place of the published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.asr.dllm_asr.test_language_models import write_source
from tests.asr.tiny_dllm import WIDTH, speech, write_shard, write_whisper
from tests.recipes.dllm_scripts import RECIPE
from tokenthrift.cli import main
from tokenthrift.dllm_asr import DllmAsr

SMALL = {
    "max_steps": 2,
    "accelerator": "cpu",
    "precision": "32-true",
    "val_check_interval": 2,
    "accumulate_grad_batches": 1,
    "enable_progress_bar": "false",
    "logger": "false",
}
KEPT = json.dumps(
    [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 2}}]
)
DRAFT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def write_step_audio(folder: Path) -> Path:
    """A tiny encoder and adapter with the names of Step-Audio-2-mini."""
    folder.mkdir()
    audio = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": WIDTH, "n_audio_head": 4, "n_audio_layer": 1}
    (folder / "config.json").write_text(json.dumps({"audio_encoder_config": audio}))
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv1.weight": (WIDTH, 80, 3),
        "encoder.conv1.bias": (WIDTH,),
        "encoder.conv2.weight": (WIDTH, WIDTH, 3),
        "encoder.conv2.bias": (WIDTH,),
        "encoder.positional_embedding.weight": (1500, WIDTH),
        "encoder.after_norm.weight": (WIDTH,),
        "encoder.after_norm.bias": (WIDTH,),
        "adapter.conv.weight": (WIDTH, WIDTH, 3),
        "adapter.conv.bias": (WIDTH,),
        "adapter.linear1.weight": (2048, WIDTH),
        "adapter.linear1.bias": (2048,),
        "adapter.linear2.weight": (3584, 2048),
        "adapter.linear2.bias": (3584,),
    }
    block = "encoder.blocks.0"
    for name in ("query", "key", "value", "out"):
        shapes[f"{block}.attn.{name}.weight"] = (WIDTH, WIDTH)
        if name != "key":
            shapes[f"{block}.attn.{name}.bias"] = (WIDTH,)
    for norm in ("attn_ln", "mlp_ln"):
        shapes |= {f"{block}.{norm}.weight": (WIDTH,), f"{block}.{norm}.bias": (WIDTH,)}
    shapes |= {f"{block}.mlp.0.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.0.bias": (4 * WIDTH,)}
    shapes |= {f"{block}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.2.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    save_file({**state, "model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder


def fit(tmp_path: Path, names: list[str], **config: Any) -> Path:
    """Runs a recipe with other sources, and saves its model; the checkpoint."""
    files = [part for name in names for part in ("--config", str(RECIPE / f"{name}.yaml"))]
    options = [f"--trainer.{name}={value}" for name, value in SMALL.items()]
    options += [f"--trainer.default_root_dir={tmp_path / 'run'}", f"--data.init_args.features={tmp_path / 'features'}"]
    options += ["--data.init_args.dev_recordings=null", f"--trainer.callbacks={KEPT}", "--trainer.limit_val_batches=0"]
    options += [f"--model.init_args.config.draft.{name}={value}" for name, value in DRAFT.items()]
    options += [f"--model.init_args.config.{name}={value}" for name, value in config.items()]
    main(["fit", *files, *options])
    return min((tmp_path / "run").rglob("*.ckpt"))


@pytest.fixture
def features(tmp_path: Path) -> Path:
    write_shard(tmp_path / "features" / "0000.safetensors", ["the quick fox", "one two", "press the key", "lazy dog"])
    return tmp_path


@pytest.mark.parametrize(
    ("names", "kind", "encoder"),
    [
        (["tiny", "llada_8b"], "llada", "whisper"),
        (["tiny", "llada_8b", "llada_8b_lora"], "llada", "step_audio"),
        (["tiny", "qwen3_0.6b"], "a2d-qwen3", "whisper"),
    ],
)
def test_two_steps(features: Path, names: list[str], kind: str, encoder: str) -> None:
    write = write_whisper if encoder == "whisper" else write_step_audio
    whisper, (_, source) = write(features / "encoder"), write_source(features / "lm", kind)
    settings = {"whisper": whisper, "encoder": encoder, "backbone.source": source}
    checkpoint = fit(features, names, **settings)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = {name for name in state if name.startswith("model.backbone.")}
    assert all(".lora_" in name for name in own)
    assert bool(own) == (names[-1] != "llada_8b")
    assert not any(name.startswith("model.encoder.") for name in state)
    if own:
        assert any(bool(state[name].any()) for name in own if "lora_B" in name), "adapters start at zero and learn"
        per_layer = 2 * 7
        assert len(own) == 2 * per_layer
    assert main(["convert", "dllm_asr", str(checkpoint), str(features / "out")]) == 0
    stored = load_file(features / "out" / "model.safetensors")
    assert {f"model.{name}" for name in stored} == {*state}
    model = DllmAsr.from_pretrained(features / "out")
    assert model.config.backbone.source == str(source)
    audio = [speech(0.9), speech(0.4, seed=1)]
    found = [transcript.text for transcript in model.transcribe(audio, decode={"max_rounds": 3})]
    assert [model.transcribe([clip], decode={"max_rounds": 3})[0].text for clip in audio] == found
