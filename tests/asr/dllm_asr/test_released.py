"""`tokenthrift convert dllm_asr` and the authors' checkpoint: a file with its keys and sizes, of two blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenthrift.cli import main
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.hub import read_config

HIDDEN, FFN, RANK = 4096, 12_288, 16
PREFIX = "llada.base_model.model.model.transformer.blocks"
SIZES = {"q_proj": HIDDEN, "k_proj": HIDDEN, "v_proj": HIDDEN, "up_proj": FFN}
NAMES = {"q_proj": "self_attn.q_proj", "up_proj": "mlp.up_proj"}


def checkpoint(blocks: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        "adapter.weight": torch.randn(HIDDEN, 3584, generator=generator),
        "adapter.bias": torch.randn(HIDDEN, generator=generator),
    }
    for block in range(blocks):
        for name, width in SIZES.items():
            state[f"{PREFIX}.{block}.{name}.lora_A.default.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            state[f"{PREFIX}.{block}.{name}.lora_B.default.weight"] = torch.randn(width, RANK, generator=generator)
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_authors_checkpoint(tmp_path: Path, wrapped: bool) -> None:
    state = checkpoint()
    torch.save({"model": state, "epoch": 5, "step": 450_000} if wrapped else state, tmp_path / "epoch_5.pt")
    assert main(["convert", "dllm_asr", str(tmp_path / "epoch_5.pt"), str(tmp_path / "out")]) == 0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    backbone = fields["backbone"]
    assert (backbone["family"], backbone["source"]) == ("llada", "GSAI-ML/LLaDA-8B-Instruct")
    assert (backbone["lora"]["rank"], backbone["lora"]["alpha"]) == (16, 32.0)
    assert backbone["lora"]["targets"] == [*SIZES]
    assert fields["encoder"]["source"] == "stepfun-ai/Step-Audio-2-mini"
    assert read_config(tmp_path / "out", DllmAsr).backbone.hidden_size == HIDDEN
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["adapter.projection.weight"], state["adapter.weight"].half())
    assert torch.equal(stored["adapter.projection.bias"], state["adapter.bias"].half())
    for old, new in NAMES.items():
        for side in "AB":
            value = stored[f"backbone.lm.model.layers.1.{new}.lora_{side}.default.weight"]
            assert torch.equal(value, state[f"{PREFIX}.1.{old}.lora_{side}.default.weight"].half())
    assert len([name for name in stored if name.startswith("backbone.")]) == 2 * 2 * len(SIZES)


def test_frozen_weights_are_left_to_their_sources(tmp_path: Path) -> None:
    """The authors load their file strictly, so it holds the whole wrapper: language model, one layer, and Step-Audio
    with an adapter of its own."""
    state = {}
    for name, tensor in checkpoint(1).items():
        own = name.replace("llada.", "llm.", 1) if name.startswith("llada.") else f"speech_proj.0.{name[8:]}"
        state[own] = tensor
    blocks = PREFIX.replace("llada.", "llm.", 1)
    for name in (f"{blocks}.0.q_proj.base_layer.weight", f"{blocks}.0.ff_out.weight", f"{blocks}.0.attn_norm.weight"):
        state[name] = torch.zeros(1, 1)
    for name in ("wte", "ln_f", "ff_out"):
        state[blocks.replace("blocks", f"{name}.weight")] = torch.zeros(HIDDEN)
    for part in ("encoder.conv1.weight", "encoder.blocks.0.attn.query.bias", "adapter.conv.weight"):
        state[f"speech_encoder.{part}"] = torch.zeros(2)
    state["speech_encoder.adapter.linear2.weight"] = torch.zeros(3584, 2048)
    state["speech_encoder.adapter.linear2.bias"] = torch.zeros(3584)
    torch.save(state, tmp_path / "file.pt")
    assert main(["convert", "dllm_asr", str(tmp_path / "file.pt"), str(tmp_path / "out")]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["adapter.projection.weight"], state["speech_proj.0.weight"].half())
    assert {name.partition(".")[0] for name in stored} == {"adapter", "backbone", "draft"}


def missing(state: dict[str, Any]) -> None:
    del state[f"{PREFIX}.1.k_proj.lora_B.default.weight"]


def misshapen(state: dict[str, Any]) -> None:
    state[f"{PREFIX}.0.up_proj.lora_B.default.weight"] = torch.zeros(HIDDEN, RANK)


def no_matrix(state: dict[str, Any]) -> None:
    state[f"{PREFIX}.0.q_proj.lora_A.default.weight"] = torch.tensor(1.0)


def other_rank(state: dict[str, Any]) -> None:
    state[f"{PREFIX}.0.q_proj.lora_A.default.weight"] = torch.zeros(8, HIDDEN)


def other_adapter(state: dict[str, Any]) -> None:
    state["adapter.weight"] = torch.zeros(HIDDEN, 1280)


def no_bias(state: dict[str, Any]) -> None:
    del state["adapter.bias"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "lora_B of k_proj in block 1 is missing"),
        (misshapen, "lora_B of up_proj in block 0 is [4096, 16] instead of [12288, 16]"),
        (no_matrix, "lora_A of q_proj in block 0 is no matrix"),
        (other_rank, "adapters of rank 8, 16, released ones have 16"),
        (other_adapter, "adapter.weight [4096, 1280]"),
        (no_bias, "the adapter Linear(3584, 4096) lacks its bias"),
    ],
)
def test_every_name_and_size_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    state = checkpoint()
    change(state)
    torch.save(state, tmp_path / "file.pt")
    assert main(["convert", "dllm_asr", str(tmp_path / "file.pt"), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
