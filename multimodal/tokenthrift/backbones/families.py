"""Published diffusion language models as masked-diffusion backbones, by family and source, without remote code.

    backbone = load_backbone("llada", "GSAI-ML/LLaDA-8B-Instruct", prompt=ids)
    shape = backbone_shape("llada", "GSAI-ML/LLaDA-8B-Instruct")  # sizes alone, no weights

| family | models | size | what loads |
| --- | --- | --- | --- |
| llada | GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5 | 8B | its own key names as a Llama; sees both ways |
| dream | Dream-org/Dream-v0-Base-7B, -Instruct-7B | 7B | Qwen2's keys; sees both ways, logits shifted |
| a2d | dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1, Qwen2.5-Coder-0.5B-...; any Qwen2, Qwen3 or Llama | 0.5B up | keys of \
transformers; the causal mask is left out |
| fast_dllm_v2 | Efficient-Large-Model/Fast_dLLM_v2_1.5B, _7B | 1.5B, 7B | Qwen2's keys; causal over blocks of 32, \
logits shifted, exact cache |
| modernbert | answerdotai/ModernBERT-base, -large; dllm-hub/ModernBERT-base-chat-v0.1, -large-chat | 0.15B, 0.4B | \
transformers' own class |
| bert | google-bert/bert-base-uncased and its kin | 0.1B up | transformers' own class |

DiffusionGemma (26B) is not among them: transformers' `DiffusionGemmaForBlockDiffusion` has no MASK token, it starts
from random tokens, reads its own last logits and takes a prompt of ids through an encoder of its own; its `generate` is
its sampler. LLaDA-MoE and LLaDA2 have experts that no class of transformers has.

Sources: the Hub repositories' config.json and tensor names; LLaDA (arXiv 2502.09992), Dream (2508.15487), Fast-dLLM v2
(2509.26328), dllm-lib's A2D conversion (an autoregressive model trained on without its causal mask).

Differs from the published modeling files, which are remote code, ignore attention masks (LLaDA) and do not run under
transformers 5: the weights are read by name into transformers' own classes and attention never reaches padding. Grouped
key and value heads, head width, biases and rotary settings come from config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tokenthrift.backbones.language_models import decoder_from_state, language_model
from tokenthrift.backbones.llada import llada_settings, llada_state
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.backbones.shape import BIDIRECTIONAL, DECODERS, AttentionMask, BackboneShape
from tokenthrift.config import ConfigError, from_plain, read_json
from tokenthrift.sources import SourceError, fetch, fetch_weights

__all__ = ["Family", "backbone_shape", "backbone_state", "load_backbone"]

Family = Literal["llada", "dream", "a2d", "fast_dllm_v2", "modernbert", "bert"]

_MODEL_TYPES: Final[Mapping[str, Mapping[str, str]]] = {
    "llada": {"llada": "llama"},
    "dream": {"Dream": "qwen2"},
    "a2d": {f"{prefix}{name}": name for name in DECODERS for prefix in ("a2d-", "")},
    "fast_dllm_v2": {"Fast_dLLM_Qwen": "qwen2"},
    "modernbert": {"modernbert": "modernbert"},
    "bert": {"bert": "bert"},
}
"""By family: the published `model_type`, and the class of transformers that computes it."""
_SHIFTED: Final = ("dream", "fast_dllm_v2")
_MASK_TOKENS: Final = ("<|mdm_mask|>", "<|mask|>", "|<MASK>|", "[MASK]", "<mask>")
_FAST_DLLM_MASK: Final = 151665  # its config.json does not name it
_KEPT: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings"),
)
# Parts of the names of configuration fields that do not change what a language model says of a text.
_UNCHECKED: Final = (
    *("architectures", "auto_map", "cache", "chunk", "classifier", "deterministic", "dropout", "dtype", "initializer"),
    *("label", "name", "output", "pad", "position_embedding_type", "pretraining", "problem", "reference", "repad"),
    *("return", "sparse", "token_id", "version"),
)


def load_backbone(
    family: Family,
    source: str | Path,
    *,
    prompt: Sequence[int] = (),
    header: Sequence[int] = (),
    mask_id: int | None = None,
    attention: AttentionMask | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> PrefixBackbone:
    """Loads a diffusion language model.

    Args:
        family: see the table above.
        source: a folder, or a repository on the Hub, with config.json and model.safetensors (or its shards).
        prompt: token ids between memory and response.
        header: token ids before the memory.
        mask_id: id of MASK; from config.json or tokenizer.json if not given.
        attention: who sees whom; what the family was trained with if not given. "prefix" gives a model that is trained
            on with that mask an exact cache of its prefix.
        dtype: of the weights; that of the file if not given.
        revision: branch, tag or commit; only for the Hub.

    Returns:
        The backbone in evaluation mode.

    Raises:
        ValueError: the family is unknown, the folder holds another one, or nothing says which id MASK has.
        SourceError: there is no such source, or a file is missing.
        RuntimeError: a tensor is missing, unknown or of another shape.
    """
    shape = backbone_shape(family, source, mask_id=mask_id, attention=attention, revision=revision)
    if shape.model_type in DECODERS:
        lm = decoder_from_state(shape.for_transformers(), backbone_state(family, source, revision=revision))
    else:
        lm = language_model(source, revision=revision)
    lm.train(False)
    if dtype is not None:
        lm.to(dtype)
    return PrefixBackbone(
        lm,
        shape.mask_id,
        prompt=prompt,
        header=header,
        shifted=shape.shifted,
        attention=shape.attention,
        block_size=shape.block_size,
    ).train(False)


def backbone_shape(
    family: Family,
    source: str | Path,
    *,
    mask_id: int | None = None,
    attention: AttentionMask | None = None,
    **options: Any,
) -> BackboneShape:
    """What a diffusion language model is made of, from its config.json; no weights are read.

    Args:
        family: see the table above.
        source: a folder, or a repository on the Hub.
        mask_id: as for `load_backbone`.
        attention: as for `load_backbone`.
        options: of `sources.fetch`.

    Raises:
        ValueError: as `load_backbone`, or a setting that a saved backbone cannot say.
        SourceError: there is no such source.
    """
    if family not in get_args(Family):
        raise ValueError(f"family {family!r} is not one of {', '.join(get_args(Family))}")
    folder = fetch(source, ["config.json"], **options)
    config = read_json(folder / "config.json")
    found, types = str(config.get("model_type")), _MODEL_TYPES[family]
    if found not in types:
        raise ConfigError(f"{source} holds a {found!r}; family {family!r} reads {', '.join(map(repr, types))}")
    own: dict[str, Any] = {
        "mask_id": _mask_id(family, config, source, options) if mask_id is None else mask_id,
        "attention": attention or ("blocks" if family == "fast_dllm_v2" else "full"),
        "block_size": config.get("bd_size", 32),
        "shifted": family in _SHIFTED,
    }
    if family == "llada":
        try:
            settings = llada_settings(config)
        except KeyError as missing:
            raise ConfigError(f"{source}: config.json of a LLaDA lacks {missing}") from None
        return _shape(source, settings, own)
    if types[found] in BIDIRECTIONAL:
        return _bidirectional(folder, source, own)
    if config.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is true; a backbone's mask has no sliding window")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{source}: hidden_act is {config['hidden_act']!r}; a saved backbone has 'silu'")
    settings = {name: config[name] for name in _KEPT if config.get(name) is not None}
    found_rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found_rotary, Mapping):
        raise ConfigError(f"{source}: the rotary embedding of config.json is {found_rotary!r}, not an object")
    rotary = {name: value for name, value in found_rotary.items() if value is not None}
    if "type" in rotary:
        rotary["rope_type"] = rotary.pop("type")
    rotary.setdefault("rope_type", "default")
    if "rope_theta" in config:
        rotary.setdefault("rope_theta", config["rope_theta"])
    return _shape(source, {**settings, "model_type": types[found], "rope_parameters": rotary}, own)


def backbone_state(family: Family, source: str | Path, **options: Any) -> dict[str, Tensor]:
    """The weights of a diffusion language model under the names of transformers, in the precision of the file.

    Args:
        family: see the table above.
        source: a folder, or a repository on the Hub.
        options: of `sources.fetch`.

    Raises:
        SourceError: there is no such source, or a file is missing.
        KeyError: a tensor name that LLaDA does not have.
    """
    if family in BIDIRECTIONAL:
        # transformers knows the names that its older checkpoints have.
        lm = language_model(source, **options)
        return {name: tensor.detach() for name, tensor in lm.state_dict().items()}
    state = {name: tensor for path in fetch_weights(source, **options) for name, tensor in load_file(path).items()}
    return llada_state(state) if family == "llada" else state


def _shape(source: str | Path, settings: Mapping[str, Any], own: Mapping[str, Any]) -> BackboneShape:
    """The shape of a published config.json's settings; an error names one that is missing or of another type."""
    return from_plain(BackboneShape, {**settings, **own}, f"{source}: config.json")


def _bidirectional(folder: Path, source: str | Path, own: Mapping[str, Any]) -> BackboneShape:
    """The shape of a BERT or ModernBERT; what it cannot say has to be as in a fresh model."""
    found = AutoConfig.from_pretrained(folder)
    kept = [name for name in _KEPT if name in BackboneShape.__dataclass_fields__ and name != "head_dim"]
    settings = {name: value for name in kept if (value := getattr(found, name, None)) is not None}
    shape = BackboneShape(model_type=found.model_type, **settings, **own)
    expected: Any = AutoConfig.for_model(**shape.for_transformers())
    for name, value in expected.to_dict().items():
        if any(word in name for word in _UNCHECKED) or getattr(found, name, value) == value:
            continue
        raise ConfigError(f"{source}: {name} is {getattr(found, name)}; a saved backbone has {value}")
    return shape


def _mask_id(family: str, config: Mapping[str, Any], source: str | Path, options: Mapping[str, Any]) -> int:
    if config.get("mask_token_id") is not None:
        given: int = config["mask_token_id"]  # its type is checked with all the others
        return given
    try:
        text = (fetch(source, ["tokenizer.json"], **options) / "tokenizer.json").read_text(encoding="utf-8")
        added = {token["content"]: token["id"] for token in json.loads(text).get("added_tokens", [])}
    except SourceError:
        added = {}
    for name in _MASK_TOKENS:
        if name in added:
            return int(added[name])
    if family == "fast_dllm_v2":
        return _FAST_DLLM_MASK
    raise ConfigError(f"neither config.json nor tokenizer.json of {source} names a MASK token: pass mask_id")
