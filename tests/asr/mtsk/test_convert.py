"""Made-up checkpoints of each published layout to model folders, and AV-HuBERT's own files."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.asr.tiny_mtsk import BOS, EOS, LLAMA3, characters, lips, speech, tiny_config, tiny_model
from tokenthrift.cli import main
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert
from tokenthrift.mtsk.config import Strategy, VideoConfig
from tokenthrift.mtsk.convert import mtsk
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.sources import WeightsError

VIDEO = VideoConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, channels=(4, 4, 8, 8), lora=2
)
ALL = ("asr", "vsr", "avsr")


def published(model: LlamaMtsk, task_adapters: bool = False) -> dict[str, Tensor]:
    """The state of a model under the authors' names; adapters per scale, or those of each task's first scale."""
    strategy, scales = model.config.lora.strategy, model.config.scales
    streams = {(True, False): "audio", (False, True): "video", (True, True): "audiovisual"}
    out = {"audio_encoder.embed_positions.weight": torch.zeros(1500, 32)}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] in ("lora", "video_lora"):
            layer, name, k, way = parts[2], parts[3].upper(), int(parts[4]), parts[5]
            owner = "llm.model" if parts[0] == "lora" else "video_encoder.encoder"
            prefix = f"{owner}.layers.{layer}.self_attn."
            adapter = f"lora_{way}_{name}"
            if strategy == "MS" or parts[0] == "video_lora":
                out[f"{prefix}{adapter}.weight"] = value
            elif k == len(scales):
                whole = f"{adapter}_shared" if task_adapters else f"global_lora.{adapter}"
                out[f"{prefix}{whole}.weight"] = value
            elif not task_adapters:
                out[f"{prefix}local_loras.{k}.{adapter}.weight"] = value
            else:
                task = streams[bool(scales[k].audio), bool(scales[k].video)]
                out.setdefault(f"{prefix}{adapter}.{task}.weight", value)
        elif parts[0] == "language_model" and "lm_head" not in key:
            out[key.replace("language_model.", "llm.", 1)] = value
        elif parts[0] in ("audio_encoder", "video_encoder", "audio_proj", "video_proj"):
            out[key] = value
    out["video_encoder.mask_emb"] = torch.zeros(64)
    return out


@pytest.fixture
def beside(tmp_path: Path) -> list[str]:
    """What a published checkpoint does not say."""
    language_model = {
        "model_type": "llama",
        "vocab_size": 34,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 16_384,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3,
        "bos_token_id": BOS,
        "eos_token_id": [EOS, 3],
    }
    (tmp_path / "config.json").write_text(json.dumps(language_model))
    (tmp_path / "whisper.json").write_text(json.dumps({"model_type": "whisper", "encoder_attention_heads": 4}))
    characters().save(str(tmp_path / "tokenizer.json"))
    return [str(tmp_path / name) for name in ("config.json", "whisper.json", "tokenizer.json")]


def model_of(strategy: Strategy, **changes: Any) -> LlamaMtsk:
    """A model as published: five rows more for padding and markers, adapters in the visual encoder too."""
    language_model = replace(tiny_config().language_model, vocab_size=39)
    return tiny_model(strategy, language_model=language_model, video=VIDEO, compat="released", **changes)


@pytest.mark.parametrize(
    ("layout", "strategy", "changes"),
    [
        ("plain", "MS", {}),
        ("plain", "MS", {"compression": "stack"}),
        ("plain", "SS", {"projector_norm": False}),
        ("lightning", "MSS", {}),
        ("omni", "MSS", {"tasks": ALL}),
        ("omni", "SS", {"tasks": ALL}),
        ("omni", "MS", {"tasks": ALL}),
    ],
)
def test_each_published_layout_computes_what_it_did(
    tmp_path: Path, beside: list[str], layout: str, strategy: Strategy, changes: dict[str, Any]
) -> None:
    model = model_of(strategy, **changes)
    omni = layout == "omni"
    state = published(model, task_adapters=omni)
    if omni:
        state["prompt_audiovisual"] = torch.zeros(1, 3, dtype=torch.int64)
    path = tmp_path / "LRS3_MTSK_avg-pooling_Whisper-S_audio4-16_video2-5_LN_seed7.pth"
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}} if layout == "lightning" else state, path)
    assert main(["convert", "mtsk", str(path), *beside, str(tmp_path / "out")]) == 0
    found = LlamaMtsk.from_pretrained(tmp_path / "out")
    assert found.config.released
    assert found.config.scales == model.config.scales
    assert found.config.lora.strategy == strategy
    assert found.config.compression == model.config.compression
    assert (found.config.bos_id, found.config.eos_id) == (BOS, EOS)
    streams = ([speech(0.6, 1), speech(0.5, 2)], [lips(0.6, 1, 96), lips(0.5, 2, 96)])
    encoded, texts = model.encode(*streams), [model.token_ids("ab"), model.token_ids("c")]
    firsts = {(bool(r.audio), bool(r.video)): r for r in reversed(model.config.scales)}
    for rates in firsts.values() if omni else model.config.scales:
        ours = found.loss(found.encode(*streams), texts, rates)
        # The file is in half precision.
        torch.testing.assert_close(ours, model.loss(encoded, texts, rates), rtol=2e-3, atol=2e-3)


def test_one_pair_of_rates_and_shared_projectors(tmp_path: Path, beside: list[str]) -> None:
    model = model_of("MS", audio_rates=(4,), video_rates=(2,))
    state = published(model)
    kept = [key for key in state if not ("lora_" in key and key.startswith("video_encoder"))]
    state = {key.replace("_proj.0.", "_proj.", 1): state[key] for key in kept}
    path = tmp_path / "AVSR_Whisper-M_AVH-L_Llama3.1-8B_lrs3vox_Adown4_Vdown2_seed42.pth"
    torch.save(state, path)
    found = mtsk([path, *map(Path, beside)])
    assert isinstance(found, LlamaMtsk)
    assert found.config.scales == (Rates(4, 2),)
    assert found.video_lora is None
    # One projector for every rate: the rates of a JSON file count.
    (tmp_path / "fields.json").write_text('{"audio_rates": [4, 16], "video_rates": [2, 5]}')
    found = mtsk([path, *map(Path, beside), tmp_path / "fields.json"])
    assert isinstance(found, LlamaMtsk)
    assert len(found.config.scales) == 4
    weights = [layer[0].weight for layer in found.audio_proj]  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])


def test_what_is_missing_is_named(tmp_path: Path, beside: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    state = published(model_of("MS"))
    path = tmp_path / "model.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"config.json and tokenizer.json"):
        mtsk([path])
    with pytest.raises(WeightsError, match=r"2 audio projectors but 0 rates; give audio_rates in a JSON file"):
        mtsk([path, *map(Path, beside)])
    (tmp_path / "fields.json").write_text('{"audio_rates": [4, 16], "video_rates": [2, 5]}')
    del state["audio_encoder.layer_norm.bias"]
    torch.save(state, path)
    arguments = [str(path), *beside, str(tmp_path / "fields.json"), str(tmp_path / "out")]
    assert main(["convert", "mtsk", *arguments]) == 1
    assert "audio_encoder.layer_norm.bias is missing" in capsys.readouterr().err
    torch.save(state | {"llm.model.layers.0.MoE_adapter.gate.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="MoME"):
        mtsk([path, *map(Path, beside), tmp_path / "fields.json"])


def test_an_avhubert_file_is_read_without_fairseq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fairseq.data.dictionary")
    ran: list[str] = []

    class Dictionary:
        def __init__(self) -> None:
            self.symbols = ["a"]

        def __setstate__(self, state: object) -> None:
            ran.append("state")

    Dictionary.__module__, Dictionary.__qualname__ = module.__name__, "Dictionary"
    module.Dictionary = Dictionary  # type: ignore[attr-defined]
    encoder = AvHubert(64, 1, 1, 64, (4, 4, 8, 8))
    state = {f"encoder.w2v_model.{key}": value for key, value in encoder.state_dict().items()}
    extra = {"encoder.w2v_model.mask_emb": torch.zeros(64), "decoder.embed": torch.zeros(3)}
    packages = {name: types.ModuleType(name) for name in ("fairseq", "fairseq.data")} | {module.__name__: module}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    path = tmp_path / "large_vox_iter5.pt"
    torch.save({"model": state | extra, "task_state": {"dictionaries": [Dictionary()]}, "args": None}, path)
    for name in packages:
        monkeypatch.delitem(sys.modules, name)
    assert main(["convert", "avhubert", str(path), str(tmp_path / "avhubert")]) == 0
    assert ran == []
    assert (tmp_path / "avhubert" / "avhubert.safetensors").is_file()
    model = tiny_model(
        video=VideoConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=64,
            channels=(4, 4, 8, 8),
            source="avhubert",
        )
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "avhubert").rename(tmp_path / "model" / "avhubert")
    found = LlamaMtsk.from_pretrained(tmp_path / "model")
    assert found.video_encoder is not None
    for name, value in found.video_encoder.state_dict().items():
        torch.testing.assert_close(value, encoder.state_dict()[name], rtol=1e-3, atol=1e-3)
