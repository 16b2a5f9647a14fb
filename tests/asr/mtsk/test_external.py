"""Frozen parts whose weights lie elsewhere: named or included, loaded once, whole or in shards."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, WhisperConfig, WhisperModel
from transformers.initialization import no_init_weights

from tests.asr.tiny_mtsk import characters, lips, speech, tiny_config
from tokenthrift.config import ConfigError
from tokenthrift.mtsk import language_model
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert
from tokenthrift.mtsk.config import LanguageModelConfig
from tokenthrift.mtsk.external import AVHUBERT_FILE, PARTS
from tokenthrift.mtsk.language_model import build, read_sizes
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.training.assembly import AssemblyConfig, assemble
from tokenthrift.sources import WeightsError
from tokenthrift.weights import read_header


def write_parts(folder: Path) -> dict[str, str]:
    """A language model whose settings ask for sampling, and a Whisper, as transformers saves them."""
    torch.manual_seed(0)
    lm: Any = build(tiny_config().language_model)
    lm.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    lm.save_pretrained(folder / "lm")
    characters().save(str(folder / "lm" / "tokenizer.json"))
    sizes = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    whisper = WhisperConfig(**sizes, decoder_layers=1, decoder_attention_heads=2, vocab_size=60, pad_token_id=0)
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    (folder / "avhubert").mkdir()
    save_file(AvHubert(64, 1, 1, 64, (4, 4, 8, 8)).state_dict(), folder / "avhubert" / AVHUBERT_FILE)
    return {name: str(folder / part) for name, part in (("language_model", "lm"), ("whisper", "whisper"))} | {
        "avhubert": str(folder / "avhubert")
    }


def assembled(folder: Path, **options: Any) -> LlamaMtsk:
    """A model around the parts of `write_parts`."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"bos": "<bos>", "eos": "<eos>", "audio_rates": (4,), "video_rates": (2,)}
    own |= write_parts(folder) | {"projector_hidden_size": 16} | options
    return assemble(AssemblyConfig(**own))


def test_code_of_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        read_sizes(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_a_llama_with_biases_and_another_activation_comes_back_as_it_was(tmp_path: Path, act: str) -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_act=act
    )
    config.attention_bias = config.mlp_bias = act == "gelu"
    config.save_pretrained(tmp_path)
    sizes = read_sizes(tmp_path)
    assert (sizes.attention_bias, sizes.mlp_bias, sizes.hidden_act) == (act == "gelu", act == "gelu", act)
    names = set(build(sizes).state_dict())
    assert ("model.layers.0.mlp.down_proj.bias" in names) == (act == "gelu")


def test_an_activation_or_bias_that_no_language_model_here_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_act must be one of silu"):
        LanguageModelConfig(hidden_act="no_such")
    with pytest.raises(ConfigError, match="settings of a Llama"):
        LanguageModelConfig(model_type="qwen2", mlp_bias=True)


@pytest.mark.parametrize("include", [True, False])
def test_frozen_parts_are_named_or_included(tmp_path: Path, include: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unset: list[bool] = []

    @contextmanager
    def noted() -> Iterator[None]:
        unset.append(True)
        with no_init_weights():
            yield

    monkeypatch.setattr(language_model, "no_init_weights", noted)
    model = assembled(tmp_path, include_frozen=include)
    assert unset, "the language model is not filled with random numbers first"
    model.save_pretrained(tmp_path / "model")
    names = read_header(tmp_path / "model" / "model.safetensors")
    frozen = {name.split(".")[0] for name in names} & {*PARTS.values()}
    assert frozen == ({*PARTS.values()} if include else set())
    loaded = LlamaMtsk.from_pretrained(tmp_path / "model")
    audio, pictures = [speech(0.5, 1)], [lips(0.5, 1, 88)]
    encoded, texts = model.encode(audio, pictures), [model.token_ids("abc")]
    for ours in (loaded, copy.deepcopy(loaded)):
        assert torch.equal(
            ours.loss(ours.encode(audio, pictures), texts, Rates(4, 2)), model.loss(encoded, texts, Rates(4, 2))
        )
        assert len({ours.transcribe(audio, pictures)[0].text for _ in range(3)}) == 1
    # A checkpoint without the frozen parts goes into a model that has them.
    model.load_state_dict(loaded.state_dict())


def test_no_part_is_built_twice_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembled(tmp_path).save_pretrained(tmp_path / "model")
    built: list[str] = []
    whole = AutoModelForCausalLM.from_config

    def count(*arguments: Any, **options: Any) -> Any:
        built.append("meta" if torch.empty(0).is_meta else "real")
        return whole(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", count)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
    model = LlamaMtsk.from_pretrained(tmp_path / "model")
    assert built.count("real") <= 1, "once, besides the one without memory against which files are checked"
    file = load_file(tmp_path / "lm" / "model.safetensors")
    weights = model.language_model.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], file["model.embed_tokens.weight"])
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


def test_a_language_model_in_shards(tmp_path: Path) -> None:
    model = assembled(tmp_path)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "lm" / "model.safetensors"
    state = load_file(file)
    file.unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(state)}
    for shard in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == shard}, file.with_name(shard))
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    loaded = LlamaMtsk.from_pretrained(tmp_path / "model")
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(loaded.language_model.state_dict()[name], value)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    assembled(tmp_path).save_pretrained(tmp_path / "model")
    encoder = load_file(tmp_path / "avhubert" / AVHUBERT_FILE)
    encoder["encoder.layer_norm.bias"] = torch.zeros(3)
    save_file(encoder, tmp_path / "avhubert" / AVHUBERT_FILE)
    with pytest.raises(WeightsError, match=r"encoder.layer_norm.bias is \[3\] instead of \[64\]"):
        LlamaMtsk.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(ValueError, match="is not the language model of the configuration"):
        LlamaMtsk.from_pretrained(tmp_path / "model")
