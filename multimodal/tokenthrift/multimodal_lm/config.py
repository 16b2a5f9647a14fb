"""What a `MultimodalLM` is made of, as plain data.

The frozen language model and the systems in front of it are named, not stored: a folder holds projectors and LoRA only.
Published vision-language models store a copy of both (LLaVA, arXiv 2304.08485), which is most of their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tokenthrift.config import ConfigError, check_within

__all__ = ["LanguageModelConfig", "LoraConfig", "MultimodalConfig", "PrefixConfig", "Value", "describe"]

Scalar: TypeAlias = bool | int | float | str | None
Value: TypeAlias = bool | int | float | str | list[int] | list[float] | list[str] | dict[str, Scalar] | None
"""What the fields of a transformers configuration may hold here."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The frozen language model: any causal one of transformers."""

    config: dict[str, Value]
    """The transformers configuration as plain data, with its "model_type"."""
    source: str | None = None
    """Folder or Hub id that holds its weights; a folder beside the model's own is looked for first. None where they
    are in the model's own file."""
    licence: str = ""
    """Of those weights."""

    def __post_init__(self) -> None:
        if not isinstance(self.config.get("model_type"), str):
            raise ConfigError("language_model.config needs a model_type")


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """A system in front of the language model."""

    source: str
    """Folder or Hub id of its model; a folder beside the model's own is looked for first."""
    token_size: int
    """Width of its tokens."""

    def __post_init__(self) -> None:
        check_within("token_size", self.token_size, 1, 65_536)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the language model (LoRA, arXiv 2106.09685)."""

    rank: int = 8
    """0 for none."""
    scale: float = 2.0
    """Factor of their output."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the projections that have some."""

    def __post_init__(self) -> None:
        check_within("lora.rank", self.rank, 0, 1024)


@dataclass(frozen=True, kw_only=True)
class MultimodalConfig:
    """A whole model."""

    language_model: LanguageModelConfig
    """What reads and writes."""
    prefixes: dict[str, PrefixConfig]
    """What stands in front of it, by kind: image, video, audio, lips."""
    projector_hidden_size: int = 512
    """Width inside a projector."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    end_id: int = 0
    """Token that ends an answer."""

    def __post_init__(self) -> None:
        check_within("projector_hidden_size", self.projector_hidden_size, 1, 65_536)
        unknown = set(self.prefixes).difference(("image", "video", "audio", "lips"))
        if unknown or not self.prefixes:
            raise ConfigError(
                f"prefixes are of kind image, video, audio or lips, not {sorted(unknown) or 'none at all'}"
            )


def describe(
    source: str | Path, *, licence: str = "", name: str | None = None, layers: int | None = None, **options: Any
) -> LanguageModelConfig:
    """The configuration of a transformers checkpoint.

    Args:
        source: folder or Hub id.
        licence: of its weights.
        name: how the saved model names it, if not as `source`.
        layers: take only so many of its first layers.
        options: of the Hub's client.

    Raises:
        ConfigError: a field that is neither a number, a text, nor a list or mapping of these.
    """
    from transformers import AutoConfig

    found: Mapping[str, Any] = AutoConfig.from_pretrained(source, trust_remote_code=False, **options).to_diff_dict()
    ignored = ("transformers_version", "architectures", "dtype", "_name_or_path", "pad_token_id")
    plain = {key: value for key, value in found.items() if key not in ignored and value is not None}
    if layers is not None:
        plain["num_hidden_layers"] = layers
    for key, value in plain.items():
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not all(isinstance(member, bool | int | float | str | None) for member in members):
            raise ConfigError(f"{source}: {key} is {value!r}, which this model's configuration cannot hold")
    return LanguageModelConfig(config=plain, source=name or str(source), licence=licence)
