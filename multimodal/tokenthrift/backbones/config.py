"""A prefix backbone as plain data, so that the folder of a system that holds one can say what to build.

Source: the fields are those of transformers' configurations, which the published config.json files share; grouped key
and value heads, head width and rotary settings are among them, so a Qwen3 of 16 heads and 8 key and value heads, a
LLaDA or a Dream comes back as it was saved.

Differs from transformers, whose config.json may name any field and any class: these fields are checked for their range
before anything is allocated, and what they do not say has transformers' default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import AutoConfig

from tokenthrift.backbones.language_models import DECODERS, language_model
from tokenthrift.backbones.prefix import AttentionMask, PrefixBackbone
from tokenthrift.config import ConfigError, check_within

__all__ = ["PrefixBackboneConfig"]


@dataclass(frozen=True, kw_only=True)
class PrefixBackboneConfig:
    """What a `PrefixBackbone` is made of, without its weights."""

    model_type: Literal["bert", "modernbert", "llama", "qwen2", "qwen3"]
    """Class of transformers that computes it."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    mask_id: int
    """Id of MASK."""
    num_key_value_heads: int | None = None
    """Key and value heads, shared by groups of query heads; None has as many as there are heads."""
    head_dim: int | None = None
    """Width of a head; None divides `hidden_size` among the heads."""
    rms_norm_eps: float | None = None
    rope_parameters: dict[str, float | int | str] | None = None
    """Rotary embedding; None has the class's own."""
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    tie_word_embeddings: bool | None = None
    shifted: bool = False
    """A position predicts the token after it."""
    attention: AttentionMask = "full"
    """Who sees whom."""
    block_size: int = 32
    """Of `attention="blocks"`."""

    def __post_init__(self) -> None:
        limits = {"vocab_size": 1_000_000, "hidden_size": 32_768, "num_hidden_layers": 512, "num_attention_heads": 512}
        limits |= {"intermediate_size": 262_144, "max_position_embeddings": 1_048_576, "block_size": 65_536}
        limits |= {"num_key_value_heads": 512, "head_dim": 4096}
        for name, most in limits.items():
            if (value := getattr(self, name)) is not None:
                check_within(name, value, 1, most)
        check_within("mask_id", self.mask_id, 0, self.vocab_size - 1)
        heads, shared = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % shared or (self.head_dim is None and self.hidden_size % heads):
            raise ConfigError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {shared}, and hidden_size "
                f"{self.hidden_size} of the heads where head_dim is not given"
            )
        if self.attention != "full" and self.model_type not in DECODERS:
            raise ConfigError(f"attention {self.attention!r} needs one of {', '.join(DECODERS)}")

    @classmethod
    def of(cls, backbone: PrefixBackbone) -> PrefixBackboneConfig:
        """The configuration of a backbone.

        Raises:
            ConfigError: its language model has settings that this configuration cannot say.
        """
        lm: Any = backbone.lm.config
        names = [name for name in cls.__dataclass_fields__ if hasattr(lm, name)]
        values = {name: getattr(lm, name) for name in names if name not in ("mask_id", "attention")}
        if not isinstance(values.get("rope_parameters"), dict) or lm.model_type not in DECODERS:
            values.pop("rope_parameters", None)
        own: dict[str, Any] = {
            "mask_id": backbone.mask_id,
            "shifted": backbone.shifted,
            "attention": backbone.attention,
        }
        config = cls(**values, **own, block_size=backbone.block_size)
        fresh: Any = AutoConfig.for_model(**config.for_transformers())
        for name in ("hidden_act", "hidden_activation", "sliding_window", "layer_types", "local_attention"):
            found, expected = getattr(lm, name, None), getattr(fresh, name, None)
            if found != expected:
                raise ConfigError(f"the model's {name} is {found}; a saved backbone has {expected}")
        return config

    def build(self, *, prompt: Sequence[int] = ()) -> PrefixBackbone:
        """The backbone with random weights."""
        lm = language_model(self.for_transformers())
        settings: dict[str, Any] = {"shifted": self.shifted, "attention": self.attention}
        return PrefixBackbone(lm, self.mask_id, prompt=prompt, block_size=self.block_size, **settings)

    def for_transformers(self) -> dict[str, Any]:
        """The fields that `language_model` reads."""
        own = ("mask_id", "shifted", "attention", "block_size")
        return {name: value for name, value in asdict(self).items() if name not in own and value is not None}
