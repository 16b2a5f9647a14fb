"""LLaDA's published weights as a plain Llama, without remote code.

Source: arXiv 2502.09992 and the key names of its Hub repositories (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5). A
LLaDA block is a Llama block under other names, so `LlamaForCausalLM` behind `PrefixBackbone` computes the same logits.

Differs from the published modeling file, which ignores its attention mask and does not run under transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tokenthrift.backbones.language_models import decoder_from_state

__all__ = ["llada_projection", "llada_settings", "llada_state", "llama_from_llada"]

_TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def llama_from_llada(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Builds a Llama that holds LLaDA's weights.

    Args:
        config: LLaDA's config.json as plain data.
        state: its tensors under their published names.

    Returns:
        A `LlamaForCausalLM` in evaluation mode, for `PrefixBackbone(model, config["mask_token_id"])`.

    Raises:
        ValueError: an architecture switch that a Llama does not have.
        KeyError: a tensor name that LLaDA does not have.
        RuntimeError: a tensor is missing or has the wrong shape.
    """
    return decoder_from_state(llada_settings(config), llada_state(state))


def llada_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the Llama, as plain data.

    Raises:
        ValueError: an architecture switch that a Llama does not have.
        KeyError: a field that LLaDA's has.
    """
    expected = {"layer_norm_type": "rms", "block_type": "llama", "activation_type": "silu", "rope": True}
    switches = ("alibi", "attention_layer_norm", "include_bias", "include_qkv_bias", "input_emb_norm", "scale_logits")
    expected |= dict.fromkeys(switches, False)
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"LLaDA's {name} is {config[name]!r}; a Llama has {value!r}")
    if config.get("clip_qkv") is not None:
        raise ValueError(f"LLaDA's clip_qkv is {config['clip_qkv']!r}; a Llama clips nothing")
    heads = config["n_heads"]
    return {
        "model_type": "llama",
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "hidden_size": config["d_model"],
        "intermediate_size": config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        "max_position_embeddings": config["max_sequence_length"],
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]},
        "tie_word_embeddings": config["weight_tying"],
    }


def llada_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LLaDA's tensors under the names of a Llama.

    Raises:
        KeyError: a tensor name that LLaDA does not have.
    """
    return {_llama_name(name): tensor for name, tensor in state.items()}


def llada_projection(name: str) -> str:
    """The name that a Llama has for a projection of LLaDA's blocks (`attn_out` is `o_proj`); others stay."""
    return _BLOCK.get(name, name).rpartition(".")[2]


def _llama_name(name: str) -> str:
    """model.transformer.blocks.3.ff_out.weight -> model.layers.3.mlp.down_proj.weight."""
    parts = name.removeprefix("model.transformer.").removesuffix(".weight").split(".")
    if parts[0] == "blocks":
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    return f"{_TOP[parts[0]]}.weight"
