"""A fresh dLLM-ASR model around pretrained parts: a Whisper encoder, and a language model cut to a small vocabulary.

Source: dLLM-ASR (arXiv 2601.17902) freezes a published encoder and adapts a published language model. What differs: the
language model may be Whisper's own decoder, whose weights already read the encoder, or a BERT-like model, and its
vocabulary is cut (see `vocabulary`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from tokenizers import Tokenizer

from tokenthrift.backbones.whisper_decoder import WhisperDecoderBackbone, decoder_weights
from tokenthrift.dllm_asr.config import AdapterConfig, BackboneConfig, DllmAsrConfig, DraftConfig, EncoderConfig
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.vocabulary import SPECIAL, trim
from tokenthrift.sources import fetch
from tokenthrift.whisper import encoder_weights

__all__ = ["assemble"]

FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Parts of the names of configuration fields that do not change what a language model says of a text.
UNCHECKED = (
    *("architectures", "cache", "chunk", "classifier", "deterministic", "dropout", "dtype", "initializer"),
    *("label", "name", "output", "pretraining", "problem", "return", "sparse", "token_id", "version"),
)
BEFORE_TEXT = "<|notimestamps|>"  # the last of Whisper's start tokens: its position predicts the first word


def assemble(
    whisper: str,
    language_model: str | None,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    adapter: AdapterConfig,
    draft: DraftConfig | None = None,
) -> DllmAsr:
    """Puts a model together; draft head, adapter and new token rows are random or means.

    Args:
        whisper: transformers checkpoint of an English Whisper, folder or Hub id.
        language_model: transformers checkpoint of a BERT-like or Llama-like model; None takes Whisper's decoder.
        vocab_size: most tokens to keep of the language model's vocabulary.
        max_position_embeddings: longest input of Whisper's decoder; others keep their own.
        adapter: rates of the memory.
        draft: sizes of the CTC head.

    Raises:
        ValueError: the language model is not what its family makes of the sizes that a model folder can say.
    """
    source = fetch(whisper, FILES)
    sizes, state = _read(source), load_file(source / "model.safetensors")
    encoder = EncoderConfig(
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["encoder_layers"],
        num_attention_heads=sizes["encoder_attention_heads"],
        intermediate_size=sizes["encoder_ffn_dim"],
        num_mel_bins=sizes["num_mel_bins"],
    )
    text = source if language_model is None else fetch(language_model, FILES)
    vocabulary, keep = trim(text / "tokenizer.json", vocab_size)
    lm = sizes if language_model is None else _read(text)
    backbone = BackboneConfig(
        family="whisper" if language_model is None else lm["model_type"],
        hidden_size=lm["d_model" if language_model is None else "hidden_size"],
        num_hidden_layers=lm["decoder_layers" if language_model is None else "num_hidden_layers"],
        num_attention_heads=lm["decoder_attention_heads" if language_model is None else "num_attention_heads"],
        intermediate_size=lm["decoder_ffn_dim" if language_model is None else "intermediate_size"],
        max_position_embeddings=(max_position_embeddings if language_model is None else lm["max_position_embeddings"]),
    )
    config = DllmAsrConfig(
        vocab_size=vocabulary.size,
        encoder=encoder,
        adapter=adapter,
        draft=draft or DraftConfig(),
        backbone=backbone,
    )
    model = DllmAsr(config, vocabulary)
    model.encoder.load_state_dict(encoder_weights(state))
    if isinstance(model.backbone, WhisperDecoderBackbone):
        weights = decoder_weights(state, keep, len(SPECIAL), max_position_embeddings)
        embedding = state["model.decoder.embed_tokens.weight"]
        weights["embed_tokens.weight"][vocabulary.start_id] = embedding[_token(source, BEFORE_TEXT)]
        weights["embed_tokens.weight"][vocabulary.eos_id] = embedding[sizes["eos_token_id"]]
        model.backbone.decoder.load_state_dict(weights)
    else:
        from tokenthrift.backbones.prefix import PrefixBackbone, trim_vocabulary
        from tokenthrift.backbones.prefix import language_model as load_language_model

        trimmed = trim_vocabulary(load_language_model(text), keep, len(SPECIAL))
        _check_family(trimmed.config.to_dict(), cast(PrefixBackbone, model.backbone).lm.config.to_dict())
        model.backbone = PrefixBackbone(trimmed.eval(), vocabulary.mask_id, prompt=(vocabulary.start_id,))
    return model


def _check_family(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A saved model is built again from its sizes alone, so anything else has to be as in a fresh one."""
    names = [name for name in expected if not any(word in name for word in UNCHECKED)]
    if wrong := [f"{n} {found.get(n)} instead of {expected[n]}" for n in names if found.get(n) != expected[n]]:
        raise ValueError(f"a {found['model_type']} of this kind could not be saved: {'; '.join(wrong)}")


def _token(folder: Path, content: str) -> int:
    token: int | None = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(content)
    if token is None:
        raise ValueError(f"the tokenizer in {folder} has no {content}, so it is not Whisper's")
    return token


def _read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return data
