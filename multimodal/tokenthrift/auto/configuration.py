"""`config.json` as a transformers configuration: the same file, read by the same rules.

A `config.json` says `"model_type": "tokenthrift_karl"` beside `"system": "karl"`; older folders have no `model_type`
and are known to our own loaders only. What differs from other configurations of transformers: a field that the system
does not have raises, and every range is checked, since the plain data goes through the system's own dataclass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, Final

from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig

from tokenthrift.config import ConfigError, from_plain, to_plain
from tokenthrift.hub import FORMAT_VERSION, MODEL_TYPE_PREFIX, HubModel
from tokenthrift.registry import resolve, those_with

__all__ = ["CONFIGURATIONS", "TokenthriftConfig", "register"]

# What transformers may hand to a configuration besides the fields of the model.
_OF_TRANSFORMERS: Final = {
    *(field.name for field in fields(PreTrainedConfig)),
    *("attn_implementation", "experts_implementation", "name_or_path", "num_labels", "output_attentions"),
    *("output_hidden_states", "quantization_config", "torch_dtype", "use_cache", "return_dict"),
}


class TokenthriftConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of one system; its fields are attributes (`config.codebook_size`), parts of it plain mappings.

    Args:
        fields: those of `config.json`. Without any, the system's defaults.

    Raises:
        ConfigError: a field that the system does not have, or a value out of range.
    """

    system: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        model_class = type(self).model_class()
        system, version = fields.pop("system", self.system), fields.pop("format_version", FORMAT_VERSION)
        if system != self.system:
            raise ConfigError(f"{type(self).__name__} is of the system {self.system!r}, not of {system!r}")
        fields.pop("model_type", None)
        theirs = {name: fields.pop(name) for name in list(fields) if name in _OF_TRANSFORMERS or name.startswith("_")}
        if version < FORMAT_VERSION:
            fields = model_class.upgrade_config(fields, version)
        self.tokenthrift: Any = from_plain(model_class.config_class, fields, "config.json") if fields else None
        super().__init__(**theirs)
        for name, value in self.plain().items():
            setattr(self, name, value)

    @classmethod
    def model_class(cls) -> type[HubModel]:
        """The model of this system."""
        found: type[HubModel] = resolve(those_with("model")[cls.system])
        return found

    def parsed(self) -> Any:
        """The configuration in the system's own class.

        Raises:
            ConfigError: the system has no defaults for all of its fields, and none were given.
        """
        if self.tokenthrift is None:
            return from_plain(type(self).model_class().config_class, {}, type(self).__name__)
        return self.tokenthrift

    def plain(self) -> dict[str, Any]:
        """The fields of the system as plain data; none where none were given."""
        return {} if self.tokenthrift is None else to_plain(self.tokenthrift)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into `config.json`: the system's fields, and what transformers needs to find the class."""
        theirs = {"architectures": self.architectures, "dtype": self.dtype}
        self.dict_dtype_to_str(theirs)
        quantized = {"quantization_config": self.to_dict()["quantization_config"]} if self._is_quantized else {}
        return {
            "system": self.system,
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            **{name: value for name, value in theirs.items() if value is not None},
            "transformers_version": transformers_version,
            **quantized,
            **self.plain(),
        }

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain data."""
        output: dict[str, Any] = super().to_dict()
        output.pop("tokenthrift", None)
        return output

    @property
    def _is_quantized(self) -> bool:
        return getattr(self, "quantization_config", None) is not None


def _classes() -> Iterator[type[TokenthriftConfig]]:
    for system in those_with("model"):
        name = "".join(part.capitalize() for part in system.split("_")) + "AutoConfig"
        own: dict[str, Any] = {"system": system, "model_type": MODEL_TYPE_PREFIX + system, "__module__": __name__}
        own["__annotations__"] = {"system": "ClassVar[str]", "model_type": "ClassVar[str]"}
        own["__init__"] = TokenthriftConfig.__init__
        yield type(name, (TokenthriftConfig,), own)


CONFIGURATIONS: Final[dict[str, type[TokenthriftConfig]]] = {kind.system: kind for kind in _classes()}
"""By system."""

# Pickles name a class by its module.
globals().update({kind.__name__: kind for kind in CONFIGURATIONS.values()})


def register() -> None:
    """Makes `AutoConfig` know the systems."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for kind in CONFIGURATIONS.values():
        AutoConfig.register(kind.model_type, kind, exist_ok=True)
