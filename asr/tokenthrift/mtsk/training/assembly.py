"""A fresh Llama-MTSK model around pretrained parts: a language model, a Whisper encoder and an AV-HuBERT.

Source: Llama-MTSK (arXiv 2503.06362), section 4.1: all three are frozen, adapters and projectors are new. What differs:
the parts need not be copied into every checkpoint, a model's folder can name them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer

from tokenthrift.config import ConfigError
from tokenthrift.mtsk.audiovisual.avhubert import avhubert_config
from tokenthrift.mtsk.config import (
    AudioConfig,
    Compression,
    DecodeConfig,
    LoraConfig,
    MtskConfig,
    Strategy,
    Task,
    VideoConfig,
)
from tokenthrift.mtsk.external import AVHUBERT_FILE, include_external
from tokenthrift.mtsk.language_model import read_sizes
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.sources import fetch

__all__ = ["AssemblyConfig", "assemble"]


@dataclass(frozen=True, kw_only=True)
class AssemblyConfig:
    """The parts of a new model and what is trained between them.

    Args:
        language_model: transformers checkpoint of a Llama or Qwen, folder or Hub id.
        whisper: transformers checkpoint of a Whisper; None for a model that only reads lips.
        trailing_silence: seconds of silence that Whisper reads after a recording, as for cached states of the data.
        avhubert: folder or Hub id of `avhubert.safetensors`; None for a model without a visual encoder.
        video_shrink: squares of so many pixels of a mouth crop are averaged first, as the visual encoder was trained.
        video_positions: add sinusoidal positions to video states, for a language model that counts none of its own.
        video_features: width of video states that the data hold, for a model without a visual encoder of its own.
        bos: token that starts a sequence; an empty string for a language model that has none.
        eos: token that ends a text.
        suppress_tokens: tokens that are never written, as the tokenizer spells them.
        tasks: asr, vsr and avsr, or some of them.
        audio_rates: encoder states (50 a second) per token.
        video_rates: encoder states (25 a second) per token.
        strategy: adapters for all scales (MS), one per scale (SS), or both (MSS).
        bottleneck: of the adapters.
        lora_scale: factor of an adapter's output.
        compression: mean of states (average) or one after another (stack).
        projector_hidden_size: between the two layers of a projector.
        projector_norm: a LayerNorm at the end of a projector.
        video_lora: bottleneck of adapters in the visual encoder, 0 for none; needs clips, not cached states.
        include_frozen: keep encoders and language model in the model's own files instead of naming where they lie.
    """

    language_model: str
    whisper: str | None = "openai/whisper-small.en"
    trailing_silence: float = 0.0
    avhubert: str | None = None
    video_shrink: int = 1
    video_positions: bool = False
    video_features: int | None = None
    bos: str = "<|begin_of_text|>"
    eos: str = "<|end_of_text|>"
    suppress_tokens: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ("avsr",)
    audio_rates: tuple[int, ...] = (4, 16)
    video_rates: tuple[int, ...] = (2, 5)
    strategy: Strategy = "MS"
    bottleneck: int = 64
    lora_scale: float = 0.125
    compression: Compression = "average"
    projector_hidden_size: int = 2048
    projector_norm: bool = True
    video_lora: int = 0
    include_frozen: bool = False

    def __post_init__(self) -> None:
        if self.avhubert is not None and self.video_features is not None:
            raise ConfigError("avhubert makes the video states, video_features says that the data hold them: give one")


def assemble(config: AssemblyConfig) -> LlamaMtsk:
    """Puts a model together; projectors, adapters and markers are random.

    Raises:
        SourceError: a name leads nowhere.
        ValueError: a language model of another type, or of a kind that sizes cannot describe, or a token that the
            tokenizer lacks.
    """
    tokenizer = Tokenizer.from_file(str(fetch(config.language_model, ("tokenizer.json",)) / "tokenizer.json"))
    video: VideoConfig | None = None
    if config.avhubert is not None:
        weights = load_file(fetch(config.avhubert, (AVHUBERT_FILE,)) / AVHUBERT_FILE)
        video = replace(
            avhubert_config(weights),
            shrink=config.video_shrink,
            positions=config.video_positions,
            lora=config.video_lora,
            source=config.avhubert,
        )
    elif config.video_features is not None:
        positions = config.video_positions
        video = VideoConfig(hidden_size=config.video_features, features_only=True, positions=positions)
    model = LlamaMtsk(
        MtskConfig(
            bos_id=_token(tokenizer, config.bos) if config.bos else None,
            eos_id=_token(tokenizer, config.eos),
            language_model=replace(read_sizes(config.language_model), source=config.language_model),
            audio=None if config.whisper is None else _whisper(config.whisper, config.trailing_silence),
            video=video,
            audio_rates=() if config.whisper is None else config.audio_rates,
            video_rates=() if video is None else config.video_rates,
            tasks=config.tasks,
            compression=config.compression,
            projector_hidden_size=config.projector_hidden_size,
            projector_norm=config.projector_norm,
            lora=LoraConfig(strategy=config.strategy, bottleneck=config.bottleneck, scale=config.lora_scale),
            decode=DecodeConfig(suppress_tokens=tuple(_token(tokenizer, token) for token in config.suppress_tokens)),
        ),
        tokenizer,
    )
    model.load_external()
    if config.include_frozen:
        model.config = include_external(model.config)
    return model


def _whisper(source: str, trailing_silence: float) -> AudioConfig:
    path: Path = fetch(source, ("config.json",)) / "config.json"
    sizes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return AudioConfig(
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["encoder_layers"],
        num_attention_heads=sizes["encoder_attention_heads"],
        intermediate_size=sizes["encoder_ffn_dim"],
        num_mel_bins=sizes["num_mel_bins"],
        trailing_silence=trailing_silence,
        source=source,
    )


def _token(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the language model's tokenizer has no token {token!r}; name its own")
    return int(number)
