"""Tiny Llama-MTSK models with random weights, and the published implementation's models with theirs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tokenthrift.budget import ItemSize
from tokenthrift.mtsk.config import (
    AudioConfig,
    DecodeConfig,
    LanguageModelConfig,
    LoraConfig,
    MtskConfig,
    Strategy,
    VideoConfig,
)
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.planning import ItemPlan, plan_items
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import PROMPTS

# The order of the reference's character vocabulary: letters, then two unused places, space, full stop and capital T.
CHARACTERS = "abcdefghijklmnopqrstuvwxyz~ .T#^"
BOS, EOS = 32, 33
LLAMA3: dict[str, int | float | str] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def characters() -> Tokenizer:
    """One token per character, two more for start and end."""
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)} | {"<bos>": BOS, "<eos>": EOS}
    tokenizer: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="~"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return cast(Tokenizer, tokenizer)


def tiny_config(strategy: Strategy = "MS", **changes: Any) -> MtskConfig:
    """Audio at rates 4 and 16, video at 2 and 5, everything small."""
    return replace(
        MtskConfig(
            bos_id=BOS,
            eos_id=EOS,
            language_model=LanguageModelConfig(
                vocab_size=34,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=128,
                max_position_embeddings=16_384,
                rope_parameters=LLAMA3,
            ),
            audio=AudioConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
            video=VideoConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=64,
                channels=(4, 4, 8, 8),
                crop=32,
            ),
            projector_hidden_size=32,
            lora=LoraConfig(strategy=strategy, bottleneck=2),
            decode=DecodeConfig(max_new_tokens=12),
        ),
        **changes,
    )


def tiny_model(strategy: Strategy = "MS", **changes: Any) -> LlamaMtsk:
    """A random model whose adapters and markers do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaMtsk(tiny_config(strategy, **changes), characters())
        for name, parameter in model.named_parameters():
            if ".down." in name or name == "markers":
                torch.nn.init.normal_(parameter, std=0.3)
            if name.startswith("language_model") and parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    return model.eval()


def speech(seconds: float, seed: int) -> Tensor:
    """Noise that swells and fades, (samples,) at 16 kHz."""
    generator = torch.Generator().manual_seed(seed)
    samples = int(seconds * 16_000)
    return torch.randn(samples, generator=generator) * 0.1 * torch.linspace(0, 3, samples).sin().abs()


def lips(seconds: float, seed: int, size: int = 36) -> Tensor:
    """Random pictures (T, size, size) uint8 at 25 frames a second."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (round(seconds * 25), size, size), generator=generator, dtype=torch.uint8)


def size_of(states: int, frames: int) -> ItemSize:
    """An item with so many encoder states of sound and frames of video; 0 for none."""
    return ItemSize(seconds=states / 50 if states else None, frames=frames or None)


def plan_one(config: MtskConfig, states: int, frames: int, budget: Any = None, **options: Any) -> ItemPlan:
    (plan,) = plan_items(config, [size_of(states, frames)], budget, **options)
    return plan


def around(model: LlamaMtsk, first: Rates, last: Rates) -> int:
    """Positions of start, markers and prompt that are read, at one pair of rates or at two one after the other."""

    def head(rates: Rates) -> int:
        return 1 + 2 * bool(rates.audio)

    def tail(rates: Rates) -> int:
        return 2 * bool(rates.video) + len(model.token_ids(PROMPTS[bool(rates.audio), bool(rates.video)]))

    once = head(first) + tail(first)
    if last == first:
        return once
    goes_on = model.config.lora.strategy == "MS" and first.audio == last.audio
    return once + tail(last) + (0 if goes_on else head(last))
