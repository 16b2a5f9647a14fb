"""What a prefix backbone is made of, as plain data: read and checked without torch or transformers.

Source: the fields are those of transformers' configurations, which the published config.json files share; grouped key
and value heads, head width and rotary settings are among them, so a Qwen3 of 16 heads and 8 key and value heads, a
LLaDA or a Dream comes back as it was saved.

Differs from transformers, whose config.json may name any field and any class: these fields are checked for their range
before anything is allocated, and what they do not say has transformers' default.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenthrift.config import ConfigError, check_within

__all__ = ["BIDIRECTIONAL", "DECODERS", "AttentionMask", "BackboneShape"]

BIDIRECTIONAL = ("bert", "modernbert")
DECODERS = ("llama", "qwen2", "qwen3")

AttentionMask = Literal["full", "prefix", "blocks"]
"""Who sees whom. "full": all see all. "prefix": memory and prompt do not see the response. "blocks": a position sees
its own block and those before it."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
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
            decoders = ", ".join(DECODERS)
            raise ConfigError(
                f"a {self.model_type} sees both ways; attention {self.attention!r} needs one of {decoders}"
            )

    def for_transformers(self) -> dict[str, Any]:
        """The fields that `language_model` reads."""
        own = ("mask_id", "shifted", "attention", "block_size")
        return {name: value for name, value in asdict(self).items() if name not in own and value is not None}
