"""The frozen language model: any Llama or Qwen of transformers, described by plain sizes.

Source: Llama-MTSK (arXiv 2503.06362), section 4.1 (Llama 3.1 and 3.2); Qwen as in the authors' later code. The classes
are those of transformers, used as a library; a model folder never names a class, only a model type and sizes, so a
model that these do not describe is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tokenthrift.mtsk.config import LanguageModelConfig
from tokenthrift.sources import fetch_weights

__all__ = ["build", "describe", "exact_positions", "read_sizes", "read_weights"]

# Fields that a configuration of transformers and ours have under one name.
_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
)
_LLAMA = ("attention_bias", "mlp_bias")
# Parts of the names of configuration fields that do not change the outputs of a language model.
_IGNORED = (
    *("architectures", "cache", "chunk", "dropout", "dtype", "initializer", "label", "name", "output", "pretraining"),
    *(
        "problem",
        "return",
        "token_id",
        "version",
        "window_layers",
        "quantization",
        "transformers",
        "attn_implementation",
    ),
)


def build(sizes: LanguageModelConfig) -> PreTrainedModel:
    """A language model, frozen and in evaluation mode; its weights are random, or unset where they have a source."""
    config = _config(sizes)
    with nullcontext() if sizes.source is None else no_init_weights():
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    # Llama's own generation settings sample; decoding here never does.
    lm.generation_config = GenerationConfig()
    return cast(PreTrainedModel, lm.requires_grad_(False).eval())


def read_sizes(source: str | Path, **options: Any) -> LanguageModelConfig:
    """The sizes of a transformers checkpoint; see `describe`.

    Args:
        source: folder or Hub id.
        options: of the Hub's client: `cache_dir`, `token`, `local_files_only`.
    """
    return describe(AutoConfig.from_pretrained(source, trust_remote_code=False, **options))


def read_weights(source: str | Path, sizes: LanguageModelConfig, **options: Any) -> dict[str, Tensor]:
    """The tensors of a transformers checkpoint, whole or in shards; only safetensors are read.

    Args:
        source: folder or Hub id.
        sizes: what it must be.
        options: as in `read_sizes`.

    Raises:
        SourceError: the source leads nowhere.
        ValueError: a model type that is not supported, or other sizes.
    """
    found, expected = read_sizes(source, **options), replace(sizes, source=None)
    if found != expected:
        raise ValueError(f"{source} is not the language model of the configuration: {found} instead of {expected}")
    state: dict[str, Tensor] = {}
    for path in fetch_weights(source, **options):
        state |= load_file(path)
    state = {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if sizes.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@contextmanager
def exact_positions(lm: PreTrainedModel) -> Iterator[None]:
    """Keeps the precision of the rotary frequencies through a cast of the whole model inside.

    In bf16 a frequency is up to 0.2 % off, which is about a radian after a thousand positions.
    """
    rotary: Any = lm.model.rotary_emb
    kept = dict(rotary.named_buffers())
    yield
    for name, buffer in rotary.named_buffers():
        if buffer.dtype != kept[name].dtype:
            setattr(rotary, name, kept[name].to(buffer.device))


def describe(config: PretrainedConfig) -> LanguageModelConfig:
    """The sizes of a transformers configuration.

    Raises:
        ValueError: something in it is not one of our sizes, so that a saved model would come back as another.
    """
    found = config.to_dict()
    if found.get("model_type") not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model_type {found.get('model_type')!r} is not one of llama, qwen2, qwen3")
    biases: dict[str, Any] = {}
    if found["model_type"] == "llama":
        biases = {name: bool(found.get(name)) for name in _LLAMA}
    sizes = LanguageModelConfig(
        model_type=found["model_type"],
        rope_parameters={name: value for name, value in found["rope_parameters"].items() if value is not None},
        head_dim=found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
        **{name: found[name] for name in _SAME},
        **biases,
    )
    expected = _config(sizes).to_dict()
    names = [name for name in expected if not any(word in name for word in _IGNORED)]
    if found.get("use_sliding_window") is False:
        names.remove("sliding_window")
    if wrong := [f"{n} {found.get(n)} instead of {expected[n]}" for n in names if found.get(n) != expected[n]]:
        raise ValueError(f"a {found['model_type']} of this kind could not be saved: {'; '.join(wrong)}")
    return sizes


def _config(sizes: LanguageModelConfig) -> PretrainedConfig:
    # Every Qwen 2 has heads of hidden_size / num_attention_heads; the field does not exist there.
    head_dim = {} if sizes.model_type == "qwen2" else {"head_dim": sizes.head_dim}
    return AutoConfig.for_model(
        sizes.model_type,
        rope_parameters=dict(sizes.rope_parameters),
        # With a padding token transformers would zero a row of the embedding.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **{name: getattr(sizes, name) for name in _SAME},
        **({name: getattr(sizes, name) for name in _LLAMA} if sizes.model_type == "llama" else {}),
        **head_dim,
    )
