"""A backbone goes into plain data and comes back: same tensors, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenthrift.backbones.config import PrefixBackboneConfig
from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.config import ConfigError, from_plain, to_plain

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 16, "max_position_embeddings": 64}
ROTARY = {"rope_type": "default", "rope_theta": 500000.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 8, "head_dim": 8, "rope_parameters": ROTARY, "rms_norm_eps": 1e-5},
    "qwen2": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "rope_parameters": ROTARY},
    "bert": {},
    "modernbert": {},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_backbone_comes_back_from_plain_data(model_type: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = language_model({"model_type": model_type, **SIZES, **MODELS[model_type]})
    decoder = model_type not in ("bert", "modernbert")
    attention: Any = "blocks" if decoder else "full"
    backbone = PrefixBackbone(lm, 39, prompt=(3,), shifted=decoder, attention=attention, block_size=4).train(False)
    config = from_plain(PrefixBackboneConfig, to_plain(PrefixBackboneConfig.of(backbone)))
    assert config.num_key_value_heads == MODELS[model_type].get("num_key_value_heads")
    again = config.build(prompt=(3,)).train(False)
    again.load_state_dict(backbone.state_dict())
    ids = torch.randint(0, 39, (1, 7), generator=torch.Generator().manual_seed(1))
    mask, memory = torch.ones_like(ids, dtype=torch.bool), torch.ones(1, 5, 64)
    with torch.no_grad():
        logits = [one(ids, mask, one.context(memory, torch.ones(1, 5, dtype=torch.bool))) for one in (backbone, again)]
    assert torch.equal(*logits)


def test_what_it_cannot_say_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of num_key_value_heads 3"):
        PrefixBackboneConfig(model_type="llama", mask_id=1, num_key_value_heads=3, **SIZES)
    with pytest.raises(ConfigError, match="mask_id"):
        PrefixBackboneConfig(model_type="llama", mask_id=40, **SIZES)
    with pytest.raises(ConfigError, match="prefix"):
        PrefixBackboneConfig(model_type="bert", mask_id=1, attention="prefix", **SIZES)
    lm = language_model({"model_type": "llama", **SIZES, "hidden_act": "gelu"})
    with pytest.raises(ConfigError, match="hidden_act is gelu"):
        PrefixBackboneConfig.of(PrefixBackbone(lm, 39))
