"""A MultimodalLM that fits in a test: a random Llama, KARL for pictures, Whisper's encoder for sound; and its data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.tokenizers.karl.tiny_karl import tiny_karl
from tokenthrift.dllm_asr.prefix import DllmAsrPrefix
from tokenthrift.karl.prefix import KarlPrefix
from tokenthrift.multimodal_lm import MultimodalConfig, MultimodalLM
from tokenthrift.multimodal_lm.config import LanguageModelConfig, LoraConfig, PrefixConfig

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORDS = ["<end>", "<unk>", "Picture", "Sound", "Clip", "Question", "Answer", ":", "?", "which", "is", "it"]
WORDS += ["red", "green", "loud", "quiet", "a", "b", "c", "d"]
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 1,
}


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def tiny_config(source: str | None = None, **changes: Any) -> MultimodalConfig:
    audio = tiny_dllm().config.encoder.hidden_size
    fields: dict[str, Any] = {
        "language_model": LanguageModelConfig(config=SIZES, source=source),
        "prefixes": {
            "image": PrefixConfig(source="../karl", token_size=tiny_karl().config.token_dim),
            "audio": PrefixConfig(source="../dllm", token_size=audio),
        },
        "projector_hidden_size": 24,
        "lora": LoraConfig(rank=2),
    }
    return MultimodalConfig(**(fields | changes))


def tiny_multimodal(seed: int = 0, **changes: Any) -> MultimodalLM:
    """In evaluation mode; its outputs depend visibly on everything that it reads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultimodalLM(tiny_config(**changes), tiny_tokenizer())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3 if "lora_" in name else 0.2)
                elif name.endswith("scale.weight"):
                    parameter.fill_(1.0)
    model.use_prefix(KarlPrefix(tiny_karl()))
    model.use_prefix(DllmAsrPrefix(tiny_dllm()))
    return model


def stand_in_for_smollm2(patch: pytest.MonkeyPatch) -> None:
    """Where the shipped model asks for SmolLM2, a random model of the same sizes; or that of TOKENTHRIFT_SMOLLM2."""
    auto: Any = AutoModelForCausalLM
    load = auto.from_pretrained

    def from_pretrained(source: Any, **options: Any) -> Any:
        if str(source) != SMOLLM2:
            return load(source, **options)
        if given := os.environ.get("TOKENTHRIFT_SMOLLM2"):
            return load(given, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return auto.from_config(options["config"]), {"missing_keys": set(), "mismatched_keys": set()}

    patch.setattr(auto, "from_pretrained", from_pretrained)


def save_language_model(folder: Path, *, layers: int = 2, seed: int = 3) -> Path:
    """A checkpoint of transformers, as users have them, with its tokenizer."""
    torch.manual_seed(seed)
    sizes = {name: value for name, value in SIZES.items() if name != "model_type"}
    lm: Any = LlamaForCausalLM(LlamaConfig(**(sizes | {"num_hidden_layers": layers, "initializer_range": 0.3})))
    lm.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_data(folder: Path) -> Path:
    """Questions whose answers can be read off the tokens: pictures that are red or green, sounds loud or quiet."""
    generator = torch.Generator().manual_seed(0)
    config = tiny_config()
    for part, count in (("train", 24), ("dev", 6), ("test", 6)):
        (folder / part).mkdir(parents=True)
        rows = []
        for kind, answers, length in (("image", ("red", "green"), 12), ("audio", ("loud", "quiet"), 20)):
            width = config.prefixes[kind].token_size
            signs = torch.arange(count) % 2 * 2.0 - 1
            direction = torch.linspace(-1, 1, width)
            items = 0.2 * torch.randn(count, length, width, generator=generator) + signs[:, None, None] * direction
            save_file(
                {"embeddings": items.flatten(0, 1).half(), "lengths": torch.full((count,), length)},
                folder / part / f"{kind}.safetensors",
            )
            for i in range(count):
                question = {"question": "which is it?", "answer": answers[i % 2]}
                rows.append({"kind": kind, "item": i, "task": kind, **question})
        (folder / part / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps({"image": ["green", "red"], "audio": ["loud", "quiet"]}))
    return folder
