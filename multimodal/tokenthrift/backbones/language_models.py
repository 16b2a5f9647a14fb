"""The language models of transformers that serve as masked-diffusion backbones: made fresh, loaded, or cut smaller.

Source: the model classes are those of transformers, used as a library. Two kinds serve: masked language models that see
both ways (BERT, ModernBERT), and decoders whose causal mask is replaced (Llama, Qwen2, Qwen3; LLaDA, Dream and A2D are
such decoders under other names, see `families`).

Differs from plain transformers: no row of an embedding is frozen as padding, attention is SDPA, weights are
safetensors, and a missing tensor is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from tokenthrift.backbones.shape import BIDIRECTIONAL, DECODERS
from tokenthrift.sources import fetch, fetch_weights, is_folder

__all__ = [
    "BIDIRECTIONAL",
    "DECODERS",
    "check_model_type",
    "decoder_from_state",
    "language_model",
    "trim_vocabulary",
    "vocabulary_logits",
]

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def language_model(source: str | Path | Mapping[str, Any], **options: Any) -> PreTrainedModel:
    """Makes a language model that `PrefixBackbone` takes, in float32 with SDPA attention.

    Args:
        source: a local folder or Hub id, whose pretrained weights are loaded, one file or shards with their index; or a
            configuration as plain data with its "model_type", for random weights.
        options: of `sources.fetch`.

    Returns:
        The model in evaluation mode where pretrained, in training mode where fresh. It has no `pad_token_id`:
        transformers would freeze that row of the embedding, which is often the one that ends a response.

    Raises:
        ValueError: a model family that is not supported.
        SourceError, WeightsError: as `sources.fetch_weights`.
        RuntimeError: a tensor is missing or of another shape; transformers would only warn and draw random ones. An
            encoder may lack its whole head.
    """
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if isinstance(source, Mapping):
        check_model_type(str(source.get("model_type")))
        config = AutoConfig.for_model(**{**source, **dict.fromkeys(_SPECIAL_IDS)})
        return cast(PreTrainedModel, _class_for(config).from_config(config, **settings))
    folder = fetch(source, ["config.json"], **options)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = None
    check_model_type(config.model_type)
    # All of one commit; and an index is checked before transformers follows it.
    fetch_weights(source, **options if is_folder(source) else {**options, "revision": folder.name})
    lm, found = _class_for(config).from_pretrained(
        folder, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True, **settings
    )
    missing = set(found["missing_keys"])
    if config.model_type in BIDIRECTIONAL and (head := _head(lm)) <= missing:
        missing -= head
    if wrong := sorted(map(str, [*missing, *found["mismatched_keys"]])):
        raise RuntimeError(f"{source} does not hold {', '.join(wrong[:10])} of a {config.model_type}")
    return cast(PreTrainedModel, lm)


def _head(lm: Any) -> set[str]:
    """Tensors of the head alone, which an encoder of sentences lacks; its embeddings serve as output projection."""
    shared = {tensor.data_ptr() for tensor in lm.base_model.parameters()}
    return {
        name
        for name, tensor in lm.state_dict().items()
        if not name.startswith(f"{lm.base_model_prefix}.") and tensor.data_ptr() not in shared
    }


def _class_for(config: PretrainedConfig) -> Any:
    return AutoModelForMaskedLM if config.model_type in BIDIRECTIONAL else AutoModelForCausalLM


def decoder_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PreTrainedModel:
    """Makes a decoder of given tensors, which it holds without a copy and in their dtype.

    Args:
        config: as for `language_model`, with its "model_type".
        state: tensors under the names of transformers; the output projection may be left out where it is tied.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: a model type that is not a decoder.
        RuntimeError: a tensor is missing, unknown or of another shape.
    """
    if config["model_type"] not in DECODERS:
        raise ValueError(f"model_type {config['model_type']!r} is not one of {', '.join(DECODERS)}")
    with torch.device("meta"):
        lm: Any = language_model(config)
    tied = lm.config.tie_word_embeddings and "lm_head.weight" not in state
    known = {**state, "lm_head.weight": state["model.embed_tokens.weight"]} if tied else dict(state)
    lm.load_state_dict(known, assign=True)
    if lm.config.tie_word_embeddings:
        lm.tie_weights()
    # The rotary frequencies are no part of the state and were made without values.
    lm.model.rotary_emb = type(lm.model.rotary_emb)(config=lm.config)
    lm.train(False)
    return cast(PreTrainedModel, lm)


def trim_vocabulary(lm: PreTrainedModel, keep: Sequence[int], extra: int = 0) -> PreTrainedModel:
    """Copies a language model with a smaller vocabulary: row i of the new one is row `keep[i]` of the old.

    Args:
        lm: the model, left as it is.
        keep: ids to keep, in their new order.
        extra: rows to append after them (for MASK, EOS and their like), each the mean of the kept rows.

    Returns:
        A model of the same class, dtype and mode, with `len(keep) + extra` tokens. Input embedding, output projection
        and output bias are cut alike, and stay tied where they were. The special ids of its configuration are unset.
    """
    config: PretrainedConfig = copy.deepcopy(lm.config)
    config.vocab_size = len(keep) + extra
    config.update(dict.fromkeys(_SPECIAL_IDS))
    family: Any = type(lm)
    trimmed = cast(PreTrainedModel, family(config).train(lm.training).to(lm.device, lm.dtype))
    state, shapes = lm.state_dict(), {name: tensor.shape for name, tensor in trimmed.state_dict().items()}
    rows = torch.tensor(list(keep), dtype=torch.int64, device=lm.device)
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            kept = tensor[rows]
            state[name] = torch.cat([kept, kept.mean(0, keepdim=True).expand(extra, *kept.shape[1:])])
    trimmed.load_state_dict(state)
    return trimmed


def vocabulary_logits(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The vocabulary projection, with whatever the family puts before it."""
    model: Any = lm
    if lm.config.model_type == "bert":
        logits: Tensor = model.cls(hidden)
    elif lm.config.model_type == "modernbert":
        logits = model.decoder(model.head(hidden))
    else:
        logits = model.lm_head(hidden)
    return logits


def check_model_type(model_type: str) -> None:
    """Raises a ValueError that names the model types that serve as backbones."""
    if model_type not in (*BIDIRECTIONAL, *DECODERS):
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join((*BIDIRECTIONAL, *DECODERS))}")
