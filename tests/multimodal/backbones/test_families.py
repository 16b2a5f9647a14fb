"""Published families from folders with their own key names and config fields; weights are tiny and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tokenthrift.backbones.families import backbone_shape, backbone_state, load_backbone
from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.config import ConfigError
from tokenthrift.sources import SourceError, WeightsError

VOCAB, MASK = 40, 39
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
# What the Hub's config.json of each family holds, cut to what matters here.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dream": {"model_type": "Dream", "mask_token_id": MASK, "rope_theta": 1e6, "use_sliding_window": False},
    "a2d": {"model_type": "a2d-qwen3", "head_dim": 16, "rope_theta": 1e6, "rope_scaling": None},
    "fast_dllm_v2": {"model_type": "Fast_dLLM_Qwen", "bd_size": 4, "tie_word_embeddings": True, "rope_theta": 1e6},
}
LLADA: dict[str, Any] = {
    **{"model_type": "llada", "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48},
    **{"max_sequence_length": 64, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False},
}
CLASSES = {"dream": "qwen2", "a2d": "qwen3", "fast_dllm_v2": "qwen2"}


def random_lm(config: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = language_model({"vocab_size": VOCAB, **config})
        for parameter in lm.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    lm.train(False)
    return lm


def folder_of(path: Path, family: str) -> tuple[Path, PreTrainedModel]:
    """A folder as published, and the model of transformers that it means."""
    published = {**GROUPED, **PUBLISHED[family], "vocab_size": VOCAB, "auto_map": {"AutoModel": "remote.Code"}}
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    extra: dict[str, Any] = {name: published[name] for name in ("head_dim", "tie_word_embeddings") if name in published}
    lm = random_lm({**GROUPED, **extra, "model_type": CLASSES[family], "rope_parameters": rotary})
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(published))
    added = [{"id": MASK, "content": "|<MASK>|" if family == "fast_dllm_v2" else "<|mask|>"}]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    state = {name: tensor.contiguous() for name, tensor in lm.state_dict().items()}
    if extra.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    save_file(state, path / "model.safetensors")
    return path, lm


def read(backbone: PrefixBackbone, ids: Tensor) -> Tensor:
    nothing = torch.zeros(len(ids), 0, 32), torch.zeros(len(ids), 0, dtype=torch.bool)
    with torch.no_grad():
        logits: Tensor = backbone(ids, torch.ones_like(ids, dtype=torch.bool), backbone.context(*nothing))
    return logits[..., :MASK]


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_folder_gives_the_logits_of_its_model(tmp_path: Path, family: Any) -> None:
    path, lm = folder_of(tmp_path / family, family)
    backbone = load_backbone(family, path)
    assert backbone.mask_id == MASK
    assert not backbone.training
    assert all(not parameter.is_meta for parameter in backbone.parameters())
    ids = torch.randint(0, MASK, (2, 10), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    if family == "fast_dllm_v2":
        block = torch.arange(10) // 4
        seen = (block[None] <= block[:, None])[None, None]
    model: Any = lm
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=seen).logits[..., :MASK]
    if family in ("dream", "fast_dllm_v2"):
        expected = torch.cat([expected[:, :1], expected[:, :-1]], 1)
    torch.testing.assert_close(read(backbone, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "a2d-llama", "a2d-qwen2"])
def test_any_decoder_with_grouped_heads_turns_bidirectional(tmp_path: Path, model_type: str) -> None:
    lm = random_lm({**GROUPED, "model_type": model_type.removeprefix("a2d-")})
    lm.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    backbone = load_backbone("a2d", tmp_path, mask_id=MASK)
    assert backbone.lm.config.num_key_value_heads == 2
    ids = torch.randint(0, MASK, (1, 8), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % MASK
    assert ((read(backbone, other) - read(backbone, ids)).abs().amax(-1) > 1e-4).all()


def test_llada_under_its_own_names(reference: Path, tmp_path: Path) -> None:
    source = reference / "dllm"
    config = {"model_type": "llada", **json.loads((source / "tiny_llada.json").read_text())["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(source / "tiny_llada.safetensors")
    # In two shards, as the published weights are.
    names = sorted(state)
    shards = {"a.safetensors": names[:8], "b.safetensors": names[8:]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    backbone = load_backbone("llada", tmp_path, dtype=torch.float64)
    assert backbone.mask_id == config["mask_token_id"]
    assert backbone.lm.dtype == torch.float64
    ids = torch.arange(8)[None]
    nothing = torch.zeros(1, 0, 64), torch.zeros(1, 0, dtype=torch.bool)
    logits = backbone(ids, torch.ones_like(ids, dtype=torch.bool), backbone.context(*nothing))
    assert logits.shape == (1, 8, 160)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llada", {"n_heads": None}, "lacks 'n_heads'"),
        ("llada", {"d_model": "64"}, "config.json.hidden_size: expected int, found str '64'"),
        ("llada", {"rope_theta": None}, "lacks 'rope_theta'"),
        ("dream", {"hidden_size": None}, "missing field 'hidden_size'"),
        ("dream", {"hidden_size": 32.5}, "expected int, found float 32.5"),
        ("dream", {"vocab_size": 10**9}, "vocab_size must be between 1 and 1000000"),
        ("dream", {"mask_token_id": "x"}, "config.json.mask_id: expected int"),
        ("a2d", {"rope_parameters": [1]}, "rotary embedding of config.json is \\[1\\], not an object"),
        ("a2d", {"num_hidden_layers": True}, "expected int, found bool True"),
        ("fast_dllm_v2", {"bd_size": "4"}, "config.json.block_size: expected int"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, family: Any, change: dict[str, Any], message: str) -> None:
    whole = LLADA if family == "llada" else {**GROUPED, **PUBLISHED[family]}
    whole = {**whole, "vocab_size": VOCAB, "mask_token_id": MASK, **change}
    fields = {name: value for name, value in whole.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=message):
        backbone_shape(family, tmp_path)


def test_sizes_that_a_llada_leaves_to_its_others(tmp_path: Path) -> None:
    fields = {**LLADA, "vocab_size": VOCAB, "mask_token_id": MASK, "mlp_hidden_size": None, "mlp_ratio": 4}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "n_kv_heads": None, "multi_query_attention": True}))
    shape = backbone_shape("llada", tmp_path)
    assert (shape.intermediate_size, shape.num_key_value_heads) == (128, 1)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_masked_language_models_of_transformers(tmp_path: Path, family: Any) -> None:
    sizes = {**SIZES, "max_position_embeddings": 64, "model_type": family}
    lm = random_lm(sizes)
    lm.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": MASK, "content": "[MASK]"}]}))
    backbone = load_backbone(family, tmp_path)
    assert backbone.mask_id == MASK
    ids = torch.randint(0, MASK, (1, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(read(backbone, ids), read(PrefixBackbone(lm, MASK), ids))
    with pytest.raises(ValueError, match="sees both ways"):
        load_backbone(family, tmp_path, attention="prefix")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_shards_of_masked_language_models_are_read_by_their_index(tmp_path: Path, family: Any) -> None:
    lm = random_lm({**SIZES, "max_position_embeddings": 64, "model_type": family})
    lm.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert "model.safetensors" not in shards
    backbone = load_backbone(family, tmp_path, mask_id=MASK)
    ids = torch.randint(0, MASK, (1, 8), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(read(backbone, ids), read(PrefixBackbone(lm, MASK), ids))
    state = backbone_state(family, tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.state_dict().items())
    # A tensor that no shard holds, a shard that is not there, and an index that leads out of the folder.
    whole = json.loads(index.read_text())
    last = load_file(tmp_path / shards[-1])
    name, _ = last.popitem()
    save_file(last, tmp_path / shards[-1], {"format": "pt"})
    kept = {key: shard for key, shard in whole["weight_map"].items() if key != name}
    index.write_text(json.dumps({**whole, "weight_map": kept}))
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        load_backbone(family, tmp_path, mask_id=MASK)
    index.write_text(json.dumps({**whole, "weight_map": {**kept, name: "absent.safetensors"}}))
    with pytest.raises(SourceError, match=r"absent\.safetensors"):
        load_backbone(family, tmp_path, mask_id=MASK)
    index.write_text(json.dumps({**whole, "weight_map": {**kept, name: "../model.safetensors"}}))
    with pytest.raises(WeightsError, match="other than safetensors files beside it"):
        load_backbone(family, tmp_path, mask_id=MASK)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    path, _ = folder_of(tmp_path / "dream", "dream")
    with pytest.raises(ConfigError, match="holds a 'Dream'; family 'llada' reads 'llada'"):
        load_backbone("llada", path)
    with pytest.raises(ValueError, match="family 'gpt' is not one of llada"):
        load_backbone("gpt", path)  # type: ignore[arg-type]
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        load_backbone("dream", path)
    path, _ = folder_of(tmp_path / "a2d", "a2d")
    (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="pass mask_id"):
        load_backbone("a2d", path)
    (path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="model.safetensors"):
        load_backbone("a2d", path, mask_id=MASK)
