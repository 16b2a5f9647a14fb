"""A prefix backbone from plain data and to plain data, so that the folder of a system that holds one can say what to
build; the fields are those of `shape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from tokenthrift.backbones.language_models import language_model
from tokenthrift.backbones.prefix import PrefixBackbone
from tokenthrift.backbones.shape import DECODERS, BackboneShape
from tokenthrift.config import ConfigError

__all__ = ["PrefixBackboneConfig", "build_backbone"]


@dataclass(frozen=True, kw_only=True)
class PrefixBackboneConfig(BackboneShape):
    """What a `PrefixBackbone` is made of, without its weights."""

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
        return build_backbone(self, prompt=prompt)


def build_backbone(shape: BackboneShape, *, prompt: Sequence[int] = (), header: Sequence[int] = ()) -> PrefixBackbone:
    """The backbone of a shape, with random weights.

    Args:
        shape: sizes, class and attention.
        prompt: token ids between memory and response.
        header: token ids before the memory.
    """
    settings: dict[str, Any] = {"shifted": shape.shifted, "attention": shape.attention, "block_size": shape.block_size}
    lm = language_model(shape.for_transformers())
    return PrefixBackbone(lm, shape.mask_id, prompt=prompt, header=header, **settings)
