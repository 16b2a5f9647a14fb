"""A fresh Llama-MTSK model around pretrained parts: a Whisper encoder and a language model.

Source: Llama-MTSK (arXiv 2503.06362), section 4.1: all three are frozen, adapters and projectors are new. What differs:
the parts need not be copied into every checkpoint, a model's folder can name them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.mtsk.config import AudioConfig, MTSKConfig, VideoConfig
from tokenthrift.mtsk.language_model import describe, load
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.sources import fetch
from tokenthrift.whisper import encoder_weights

__all__ = ["assemble", "video_sizes"]


def assemble(
    language_model: str,
    *,
    whisper: str | None,
    video: VideoConfig | None,
    bos_id: int | None,
    eos_id: int,
    include_frozen: bool = False,
    **options: Any,
) -> LlamaMTSK:
    """Puts a model together; projectors, adapters, markers and the visual encoder are random.

    Args:
        language_model: transformers checkpoint of a Llama or Qwen, folder or Hub id.
        whisper: transformers checkpoint of a Whisper; None for a model that only reads lips.
        video: visual encoder; None for a model that only listens.
        bos_id: token that starts a sequence, if the language model has one.
        eos_id: token that ends a text.
        include_frozen: keep the frozen weights in the model's own file instead of naming where they lie.
        options: further fields of `MTSKConfig`.

    Raises:
        SourceError: a name leads nowhere.
        ValueError: a language model of another family, or of a kind that sizes cannot describe.
    """
    lm = load(language_model)
    tokenizer = Tokenizer.from_file(str(fetch(language_model, ("tokenizer.json",)) / "tokenizer.json"))
    sizes = replace(describe(lm.config), source=None if include_frozen else language_model)
    audio = None if whisper is None else _whisper(whisper, None if include_frozen else whisper)
    if whisper is None:
        options["audio_rates"] = ()
    if video is None:
        options["video_rates"] = ()
    config = MTSKConfig(bos_id=bos_id, eos_id=eos_id, language_model=sizes, audio=audio, video=video, **options)
    model = LlamaMTSK(config, tokenizer)
    model.language_model.load_state_dict(lm.state_dict())
    if whisper is not None and model.audio_encoder is not None:
        folder = fetch(whisper, ("model.safetensors",))
        model.audio_encoder.load_state_dict(encoder_weights(load_file(folder / "model.safetensors")))
    return model


def video_sizes(weights: Mapping[str, Tensor]) -> VideoConfig:
    """The sizes of an AV-HuBERT in our layout; heads are 64 wide, as in all published ones."""
    width = len(weights["post_extract_proj.weight"])
    stages = [f"feature_extractor_video.resnet.trunk.layer{i}.0.conv1.weight" for i in (1, 2, 3, 4)]
    layers = {key.split(".")[2] for key in weights if key.startswith("encoder.layers.")}
    return VideoConfig(
        width=width,
        layers=len(layers),
        heads=max(1, width // 64),
        ffn=len(weights["encoder.layers.0.fc1.weight"]),
        channels=tuple(len(weights[key]) for key in stages),  # type: ignore[arg-type]
    )


def _whisper(source: str, named: str | None) -> AudioConfig:
    path: Path = fetch(source, ("config.json",)) / "config.json"
    sizes = json.loads(path.read_text(encoding="utf-8"))
    return AudioConfig(
        width=sizes["d_model"],
        layers=sizes["encoder_layers"],
        heads=sizes["encoder_attention_heads"],
        ffn=sizes["encoder_ffn_dim"],
        bins=sizes["num_mel_bins"],
        source=named,
    )
