"""A fresh dLLM-ASR model around pretrained parts: an encoder, and a language model, cut to a small vocabulary or whole.

Source: dLLM-ASR (arXiv 2601.17902) freezes a published encoder and adapts a published language model. What differs: the
language model may be Whisper's own decoder, whose weights already read the encoder, or any family of
`backbones.families`, and its vocabulary may be cut (see `vocabulary`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tokenthrift.backbones.shape import DECODERS, BackboneShape
from tokenthrift.backbones.tokenizer_files import source_tokenizer
from tokenthrift.backbones.whisper_decoder import WhisperDecoderBackbone, decoder_weights
from tokenthrift.dllm_asr.config import (
    AdapterConfig,
    BackboneConfig,
    DllmAsrConfig,
    DraftConfig,
    EncoderConfig,
)
from tokenthrift.dllm_asr.language_model import add_lora, completed, read_vocabulary
from tokenthrift.dllm_asr.model import DllmAsr
from tokenthrift.dllm_asr.sources import fill_external
from tokenthrift.dllm_asr.vocabulary import SPECIAL, trim
from tokenthrift.sources import fetch
from tokenthrift.whisper import encoder_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["assemble", "assemble_around", "encoder_of", "take_whisper"]

FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Parts of the names of configuration fields that do not change what a language model says of a text.
UNCHECKED = (
    *("architectures", "cache", "chunk", "classifier", "deterministic", "dropout", "dtype", "initializer"),
    *("label", "name", "output", "pretraining", "problem", "return", "sparse", "token_id", "version"),
)
BEFORE_TEXT = "<|notimestamps|>"  # the last of Whisper's start tokens: its position predicts the first word
FAMILIES: Final = {
    **{"llada": "llada", "Dream": "dream", "Fast_dLLM_Qwen": "fast_dllm_v2"},
    **{f"a2d-{name}": "a2d" for name in DECODERS},
}
"""Published diffusion models by their `model_type`; all others are what transformers says, and MASK is a new row."""


def assemble(
    whisper: str,
    language_model: str | None,
    *,
    vocab_size: int,
    max_position_embeddings: int,
    adapter: AdapterConfig,
    draft: DraftConfig | None = None,
    words: Mapping[str, int] | None = None,
) -> DllmAsr:
    """Puts a model with a small vocabulary together; draft head, adapter and new token rows are random or means.

    Args:
        whisper: transformers checkpoint of an English Whisper, folder or Hub id.
        language_model: checkpoint of a family of `backbones.families`, or a plain Llama, Qwen2 or Qwen3; None takes
            Whisper's decoder.
        vocab_size: most tokens to keep of the language model's vocabulary.
        max_position_embeddings: longest input of Whisper's decoder; others keep their own.
        adapter: rates of the memory.
        draft: sizes of the CTC head.
        words: how often each word is written, which chooses the tokens, see `vocabulary.trim`.

    Raises:
        ValueError: the language model has a setting that a model folder cannot say, or Whisper's decoder has fewer
            positions.
    """
    source = fetch(whisper, FILES)
    sizes, state = _read(source), load_file(source / "model.safetensors")
    text = source if language_model is None else fetch(language_model, ("config.json",))
    tokenizer: Path | Tokenizer = text / "tokenizer.json"
    if language_model is not None:
        tokenizer = source_tokenizer(language_model)
    vocabulary, keep = trim(tokenizer, vocab_size, words)
    parts: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "encoder": replace(encoder_of(whisper), source=None),
        "adapter": adapter,
        "draft": draft or DraftConfig(),
    }
    if language_model is not None:
        # Widths are compared before weights are read.
        width = _read(text).get("hidden_size") or _read(text)["d_model"]
        DllmAsrConfig(backbone=BackboneConfig(hidden_size=width, num_attention_heads=1), **parts)
        lm, backbone = _cut(language_model, text, keep, vocabulary.mask_id)
        model = DllmAsr(DllmAsrConfig(backbone=backbone, **parts), vocabulary)
        own: Any = model.backbone
        _check_family(lm.config.to_dict(), own.lm.config.to_dict())
        own.lm.load_state_dict(lm.state_dict())
        own.lm.train(False)
    else:
        backbone = BackboneConfig(
            family="whisper",
            hidden_size=sizes["d_model"],
            num_hidden_layers=sizes["decoder_layers"],
            num_attention_heads=sizes["decoder_attention_heads"],
            intermediate_size=sizes["decoder_ffn_dim"],
            max_position_embeddings=max_position_embeddings,
        )
        model = DllmAsr(DllmAsrConfig(backbone=backbone, **parts), vocabulary)
        _load_decoder(model, source, sizes, state, keep)
    model.encoder.load_state_dict(encoder_weights(state))
    return model


def take_whisper(model: DllmAsr, whisper: str) -> None:
    """Puts encoder and decoder of a Whisper checkpoint in place of a model's own, which keeps its tokens.

    Args:
        model: its language model is a Whisper decoder, its vocabulary a cut of Whisper's.
        whisper: transformers checkpoint of an English Whisper, folder or Hub id.

    Raises:
        ValueError: the model has tokens that this Whisper lacks, or is not of its sizes.
    """
    source = fetch(whisper, FILES)
    sizes, own, outer = _read(source), model.config.encoder, model.config.backbone
    if outer.family != "whisper":
        raise ValueError(f"the language model is of {outer.family}; a decoder of Whisper cannot take its place")
    wanted = {"d_model": own.hidden_size, "num_mel_bins": own.num_mel_bins}
    for side, part in (("encoder", own), ("decoder", outer)):
        wanted |= {f"{side}_layers": part.num_hidden_layers, f"{side}_attention_heads": part.num_attention_heads}
        wanted[f"{side}_ffn_dim"] = part.intermediate_size
    if other := [name for name, value in wanted.items() if sizes[name] != value]:
        raise ValueError(f"{whisper} has {other[0]} {sizes[other[0]]}, the model {wanted[other[0]]}")
    state, keep = load_file(source / "model.safetensors"), model.vocabulary.source_ids(_tokenizer(source))
    _load_decoder(model, source, sizes, state, keep)
    model.encoder.load_state_dict(encoder_weights(state))


def _load_decoder(
    model: DllmAsr, source: Path, sizes: Mapping[str, Any], state: dict[str, torch.Tensor], keep: list[int]
) -> None:
    """Gives a model Whisper's decoder with these tokens; start and end of a text are Whisper's too."""
    weights = decoder_weights(state, keep, len(SPECIAL), model.config.backbone.max_position_embeddings)
    embedding, vocabulary = state["model.decoder.embed_tokens.weight"], model.vocabulary
    weights["embed_tokens.weight"][vocabulary.start_id] = embedding[_token(source, BEFORE_TEXT)]
    weights["embed_tokens.weight"][vocabulary.eos_id] = embedding[sizes["eos_token_id"]]
    cast(WhisperDecoderBackbone, model.backbone).decoder.load_state_dict(weights)


def assemble_around(
    encoder: EncoderConfig,
    backbone: BackboneConfig,
    *,
    adapter: AdapterConfig,
    draft: DraftConfig | None = None,
    copy_encoder: bool = False,
    copy_language_model: bool = False,
) -> DllmAsr:
    """Puts a model around a published language model with its whole vocabulary; draft head and adapter are random.

    Args:
        encoder: see `encoder_of`.
        backbone: family and source, and low-rank adapters where these are trained.
        adapter: rates of the memory.
        draft: sizes of the CTC head.
        copy_encoder: the encoder's weights go into the model's file; otherwise its folder names their source.
        copy_language_model: likewise; all of its weights are trained then.

    Raises:
        SourceError, ValueError: a source leads nowhere, or to another model.
    """
    if copy_language_model and backbone.lora is not None:
        raise ValueError("low-rank adapters leave the language model as it is; leave lora out to train all of it")
    parts: dict[str, Any] = {"encoder": encoder, "adapter": adapter, "draft": draft or DraftConfig()}
    # The vocabulary of the source takes the place of this size.
    config = completed(DllmAsrConfig(vocab_size=8, backbone=replace(backbone, lora=None), **parts))
    model = DllmAsr(config, read_vocabulary(Path(), config.backbone))
    fill_external(model)
    named = config.backbone
    if copy_language_model:
        shape = named.language_model
        assert shape is not None
        named = replace(named, family=cast(Any, shape.model_type), source=None)
        model.backbone.requires_grad_(True)
    elif backbone.lora is not None:
        add_lora(cast(Any, model.backbone), backbone.lora, backbone.family)
        named = replace(named, lora=backbone.lora)
    encoder = replace(encoder, source=None) if copy_encoder else encoder
    model.config = replace(config, backbone=named, encoder=encoder)
    return model.eval()


def encoder_of(source: str, kind: str = "whisper") -> EncoderConfig:
    """The sizes of a published encoder, and its name.

    Args:
        source: checkpoint of a Whisper in transformers' format, or of Step-Audio-2-mini; folder or Hub id.
        kind: "whisper" or "step_audio".
    """
    sizes = _read(fetch(source, ("config.json",)))
    if kind == "step_audio":
        audio: Mapping[str, Any] = sizes["audio_encoder_config"]
        width = audio["n_audio_state"]
        return EncoderConfig(
            kind="step_audio",
            source=source,
            hidden_size=width,
            num_hidden_layers=audio["n_audio_layer"],
            num_attention_heads=audio["n_audio_head"],
            intermediate_size=4 * width,
            num_mel_bins=audio["n_mels"],
        )
    return EncoderConfig(
        source=source,
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["encoder_layers"],
        num_attention_heads=sizes["encoder_attention_heads"],
        intermediate_size=sizes["encoder_ffn_dim"],
        num_mel_bins=sizes["num_mel_bins"],
    )


def _cut(source: str, text: Path, keep: list[int], mask_id: int) -> tuple[PreTrainedModel, BackboneConfig]:
    """A language model with the rows `keep` of its vocabulary and four new ones, and its configuration."""
    from tokenthrift.backbones.config import PrefixBackboneConfig
    from tokenthrift.backbones.families import load_backbone
    from tokenthrift.backbones.prefix import PrefixBackbone, language_model, trim_vocabulary

    family = FAMILIES.get(str(_read(text).get("model_type")))
    if family is None:
        trimmed = trim_vocabulary(language_model(source), keep, len(SPECIAL))
        cut = PrefixBackbone(trimmed.eval(), mask_id)
    else:
        whole = load_backbone(cast(Any, family), source, dtype=torch.float32)
        trimmed = trim_vocabulary(whole.lm, keep, len(SPECIAL))
        with torch.no_grad():
            # It knows what MASK is.
            old, new = (cast(Any, lm.get_input_embeddings()).weight for lm in (whole.lm, trimmed))
            new[mask_id] = old[whole.mask_id]
        block = whole.block_size
        settings: dict[str, Any] = {"shifted": whole.shifted, "attention": whole.attention, "block_size": block}
        cut = PrefixBackbone(trimmed.eval(), mask_id, **settings)
    shape = PrefixBackboneConfig.of(cut)
    return trimmed, BackboneConfig(family=shape.model_type, language_model=BackboneShape(**vars(shape)))


def _check_family(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A saved model is built again from its sizes alone, so anything else has to be as in a fresh one."""
    names = [name for name in expected if not any(word in name for word in UNCHECKED)]
    if wrong := [f"{n} {found.get(n)} instead of {expected[n]}" for n in names if found.get(n) != expected[n]]:
        raise ValueError(f"a {found['model_type']} of this kind could not be saved: {'; '.join(wrong)}")


def _token(folder: Path, content: str) -> int:
    token: int | None = _tokenizer(folder).token_to_id(content)
    if token is None:
        raise ValueError(f"the tokenizer in {folder} has no {content}, so it is not Whisper's")
    return token


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return data
