"""The language model of dLLM-ASR: fresh, or a published one that the configuration names by family and source.

Source: dLLM-ASR (arXiv 2601.17902): a published diffusion language model (LLaDA-8B-Instruct) under its chat template,
`header [audio] instruction header [response]`, frozen, or with low-rank adapters. Its whole vocabulary is used.

Differs from the released code: no remote code (`backbones.families`), low-rank adapters on every projection that is
named (the released list names `o_proj`, `gate_proj` and `down_proj`, which LLaDA does not have, so PEFT adapted only
four of seven), and a token that leaves no text, so that a draft's slots may be too many.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from tokenizers import Tokenizer

from tokenthrift import extras
from tokenthrift.backbones.masked import MaskedDiffusionBackbone
from tokenthrift.backbones.tokenizer_files import read_tokenizer, source_tokenizer
from tokenthrift.config import ConfigError, read_json
from tokenthrift.dllm_asr.config import BackboneConfig, DllmAsrConfig, LoraConfig
from tokenthrift.dllm_asr.vocabulary import SpecialIds, Vocabulary
from tokenthrift.external import resolved
from tokenthrift.sources import fetch
from tokenthrift.weights import empty_parameters

if TYPE_CHECKING:  # transformers is slow to import, and Whisper's decoder needs none of it
    from tokenthrift.backbones.prefix import PrefixBackbone
    from tokenthrift.backbones.shape import BackboneShape

__all__ = [
    "completed",
    "external_parts",
    "add_lora",
    "make_backbone",
    "prompt_positions",
    "read_vocabulary",
    "source_vocabulary",
]

INSTRUCTION: Final = "Transcribe this audio into text."
_CHATML = f"<|im_start|>user\n{{audio}}{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
_HEADERS = (
    "<|start_header_id|>user<|end_header_id|>\n\n{audio}"
    f"{INSTRUCTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
TEMPLATES: Final = {
    "llada": f"<|startoftext|>{_HEADERS}",
    "llama": f"<|begin_of_text|>{_HEADERS}",
    "qwen2": _CHATML,
    "qwen3": _CHATML,
    "bert": "[CLS]{audio}[SEP]",
    "modernbert": "[CLS]{audio}[SEP]",
}
"""Chat templates by family, or by the class that computes it; the memory stands at {audio}, as published for LLaDA."""
UNUSED = ("[unused0]", "<|reserved_token_0|>", "<|reserved_special_token_0|>")
ENDS = ("[SEP]", "<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def completed(config: DllmAsrConfig, base_dir: Path | None = None) -> DllmAsrConfig:
    """The configuration with what it left to the source of its language model: sizes, and ids of special tokens.

    Args:
        config: as it was read or written by hand.
        base_dir: where a relative folder is looked for first.

    Raises:
        SourceError, ValueError: as `backbones.families.backbone_shape`.
    """
    backbone = config.backbone
    if backbone.source is None or (backbone.language_model is not None and backbone.end_id is not None):
        return config
    from tokenthrift.backbones.families import backbone_shape

    source = resolved(backbone.source, base_dir)
    mask_id = backbone.mask_id
    shape = backbone.language_model or backbone_shape(cast(Any, backbone.family), source, mask_id=mask_id)
    template = TEMPLATES.get(backbone.family) or TEMPLATES[shape.model_type]
    backbone = replace(backbone, language_model=shape, prompt=backbone.prompt or template)
    if backbone.end_id is None or backbone.delete_id is None:
        tokenizer, fields = source_tokenizer(source), read_json(fetch(source, ("config.json",)) / "config.json")
        end = _end(tokenizer, fields) if backbone.end_id is None else backbone.end_id
        delete = _unused(tokenizer, shape) if backbone.delete_id is None else backbone.delete_id
        backbone = replace(backbone, end_id=end, delete_id=delete)
    return replace(config, backbone=backbone, vocab_size=shape.vocab_size)


def read_vocabulary(folder: Path, backbone: BackboneConfig, options: dict[str, Any] | None = None) -> Vocabulary:
    """The vocabulary of a model's folder; where the folder has none, that of the language model's source.

    Args:
        folder: of the model.
        backbone: its configuration, completed.
        options: of `sources.fetch`.
    """
    path = folder / "tokenizer.json"
    if backbone.end_id is None:
        return Vocabulary.load(path)
    if path.exists() or backbone.source is None:
        return source_vocabulary(read_tokenizer(path), backbone)
    return source_vocabulary(source_tokenizer(resolved(backbone.source, folder), **(options or {})), backbone)


def source_vocabulary(tokenizer: Tokenizer, backbone: BackboneConfig) -> Vocabulary:
    """The whole vocabulary of a published language model.

    Args:
        tokenizer: its own.
        backbone: completed.

    Raises:
        ConfigError: one token is to mean two things.
    """
    shape = backbone.language_model
    assert shape is not None
    assert backbone.end_id is not None
    assert backbone.delete_id is not None
    if len({shape.mask_id, backbone.end_id, backbone.delete_id}) < 3:
        raise ConfigError(
            f"MASK {shape.mask_id}, backbone.end_id {backbone.end_id} and backbone.delete_id {backbone.delete_id} must "
            "be different tokens"
        )
    return Vocabulary(tokenizer, SpecialIds(shape.mask_id, backbone.end_id, backbone.delete_id), shape.vocab_size)


def make_backbone(config: BackboneConfig, vocab_size: int, vocabulary: Vocabulary) -> MaskedDiffusionBackbone:
    """The language model of a configuration, with random weights.

    Args:
        config: family and sizes; completed where it names a source.
        vocab_size: rows of the embedding.
        vocabulary: gives the ids of MASK and START, and of the prompt.

    Raises:
        MissingExtraError: adapters without PEFT.
    """
    if config.family == "whisper":
        from tokenthrift.backbones.whisper_decoder import WhisperDecoder, WhisperDecoderBackbone

        decoder = WhisperDecoder(
            vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            config.max_position_embeddings,
        )
        return WhisperDecoderBackbone(decoder, vocabulary.mask_id, (vocabulary.start_id,))
    from tokenthrift.backbones.config import build_backbone
    from tokenthrift.backbones.shape import BackboneShape

    shape = config.language_model or BackboneShape(
        model_type=cast(Any, config.family),
        vocab_size=vocab_size,
        mask_id=vocabulary.mask_id,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
    )
    header, prompt = [], [vocabulary.start_id]
    if config.prompt is not None and config.end_id is not None:
        header, prompt = (vocabulary.ids(part) for part in config.prompt.split("{audio}"))
    # Weights that lie elsewhere need no memory before they are read.
    with empty_parameters() if config.source is not None else nullcontext():
        backbone = build_backbone(shape, header=header, prompt=prompt)
    if config.source is not None:
        backbone.lm.requires_grad_(False)
    if config.lora is not None:
        add_lora(backbone, config.lora, config.family)
    return backbone


def add_lora(backbone: PrefixBackbone, lora: LoraConfig, family: str) -> None:
    """Puts PEFT's adapters into the projections of a language model, whose own weights are frozen.

    Raises:
        ConfigError: a projection that it does not have.
    """
    peft = extras.require("peft")
    targets = list(dict.fromkeys(lora.targets))
    if family == "llada":
        from tokenthrift.backbones.llada import llada_projection

        targets = list(dict.fromkeys(llada_projection(name) for name in targets))
    known = {name.rpartition(".")[2] for name, module in backbone.lm.named_modules() if hasattr(module, "weight")}
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(f"lora.targets: a {backbone.lm.config.model_type} has no {', '.join(unknown)}")
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none"
    )
    peft.inject_adapter_in_model(settings, backbone.lm)
    for name, parameter in backbone.lm.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def prompt_positions(backbone: MaskedDiffusionBackbone) -> int:
    """Positions that stand before the response, the memory not counted."""
    header, prompt = getattr(backbone, "header", None), getattr(backbone, "prompt", None)
    return 1 if prompt is None else len(prompt) + (0 if header is None else len(header))


def external_parts(config: DllmAsrConfig) -> dict[str, str]:
    """Modules whose weights lie elsewhere, and the folder or Hub id of each."""
    parts = {"encoder": config.encoder.source, "backbone.lm": config.backbone.source}
    if config.encoder.kind == "step_audio":
        parts["adapter.frontend"] = config.encoder.source
    return {part: source for part, source in parts.items() if source is not None}


def _end(tokenizer: Tokenizer, fields: dict[str, Any]) -> int:
    found: Any = fields.get("eos_token_id", fields.get("pad_token_id"))
    found = found[0] if isinstance(found, list) and found else found
    for name in ENDS:
        found = tokenizer.token_to_id(name) if found is None else found
    if found is None:
        raise ConfigError("nothing says which token ends a text: set backbone.end_id")
    return int(found)


def _unused(tokenizer: Tokenizer, shape: BackboneShape) -> int:
    """A token that no text has."""
    for name in UNUSED:
        if (found := tokenizer.token_to_id(name)) is not None:
            return int(found)
    beyond = max(tokenizer.get_vocab().values()) + 1
    beyond += beyond == shape.mask_id  # MASK may be a row that the tokenizer does not list
    if beyond >= shape.vocab_size:
        raise ConfigError("every row of the embedding is a token of its own: set backbone.delete_id to one of no use")
    return beyond
