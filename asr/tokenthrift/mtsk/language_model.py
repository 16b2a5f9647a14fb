"""The frozen language model: any Llama or Qwen of transformers, described by plain sizes.

Source: Llama-MTSK (arXiv 2503.06362), section 4.1 (Llama 3.1 and 3.2); Qwen as in the authors' later code. The classes
are those of transformers, used as a library; a model folder never names a class, only a family and sizes, so what those
cannot say is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from tokenthrift.mtsk.config import LanguageModelConfig

__all__ = ["build", "describe", "exact_positions", "load"]

# Parts of the names of configuration fields that do not change what a language model says of a text.
_MEANINGLESS = (
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
    """A language model with random weights, frozen and in evaluation mode."""
    config = _config(sizes)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return _frozen(cast(PreTrainedModel, lm))


def load(source: str | Path, sizes: LanguageModelConfig | None = None, **options: Any) -> PreTrainedModel:
    """A language model with its published weights, frozen and in evaluation mode.

    Args:
        source: folder or Hub id of a transformers checkpoint; only safetensors are read.
        sizes: what it must be, where a model folder says so.
        options: of transformers' loader (`cache_dir`, `token`, `local_files_only`, `dtype`).

    Raises:
        ValueError: a family that is not supported, or other sizes than those asked for.
    """
    lm = AutoModelForCausalLM.from_pretrained(
        source,
        use_safetensors=True,
        trust_remote_code=False,
        **{"attn_implementation": "sdpa", "dtype": torch.float32, **options},
    )
    found = describe(lm.config)
    if sizes is not None and _config(found).to_dict() != _config(sizes).to_dict():
        raise ValueError(f"{source} is not the language model of the configuration: {found} instead of {sizes}")
    return _frozen(cast(PreTrainedModel, lm))


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
        ValueError: something in it cannot be said by sizes, so that a saved model would come back as another.
    """
    found = config.to_dict()
    if found.get("model_type") not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"model_type {found.get('model_type')!r} is not one of llama, qwen2, qwen3")
    sizes = LanguageModelConfig(
        family=found["model_type"],
        vocab_size=found["vocab_size"],
        width=found["hidden_size"],
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        kv_heads=found["num_key_value_heads"],
        head_dim=found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
        ffn=found["intermediate_size"],
        positions=found["max_position_embeddings"],
        rope={name: value for name, value in found["rope_parameters"].items() if value is not None},
        norm_eps=found["rms_norm_eps"],
        tied=found["tie_word_embeddings"],
    )
    expected = _config(sizes).to_dict()
    names = [name for name in expected if not any(word in name for word in _MEANINGLESS)]
    if found.get("use_sliding_window") is False:
        names.remove("sliding_window")
    if wrong := [f"{n} {found.get(n)} instead of {expected[n]}" for n in names if found.get(n) != expected[n]]:
        raise ValueError(f"a {found['model_type']} of this kind could not be saved: {'; '.join(wrong)}")
    return sizes


def _config(sizes: LanguageModelConfig) -> PretrainedConfig:
    # Every Qwen 2 has heads of width / heads; the field does not exist there.
    head_dim = {} if sizes.family == "qwen2" else {"head_dim": sizes.head_dim}
    return AutoConfig.for_model(
        sizes.family,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.ffn,
        max_position_embeddings=sizes.positions,
        rope_parameters=dict(sizes.rope),
        rms_norm_eps=sizes.norm_eps,
        tie_word_embeddings=sizes.tied,
        # With a padding token transformers would zero a row of the embedding.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **head_dim,
    )


def _frozen(lm: PreTrainedModel) -> PreTrainedModel:
    lm.config.pad_token_id = None
    # Llama's own generation settings sample; decoding here never does unless it is asked to.
    lm.generation_config = GenerationConfig()
    return cast(PreTrainedModel, lm.requires_grad_(False).eval())
