"""Small stand-ins of the documented parts of lmms-eval 0.7.3 and VLMEvalKit 0.3 that models are written against."""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class ModelManifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Request:
    """`lmms_eval.api.instance.Instance`, as far as models read it."""

    args: tuple[Any, ...]


@dataclass
class TokenCounts:
    """`lmms_eval.api.instance.TokenCounts`."""

    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    """`lmms_eval.api.instance.GenerationResult`."""

    text: str
    token_counts: TokenCounts | None = None


@dataclass
class CacheHook:
    """`lmms_eval.api.model.CacheHook`."""

    kept: list[tuple[str, Any, str]] = field(default_factory=list)

    def add_partial(self, attr: str, req: Any, res: str) -> None:
        self.kept.append((attr, req, res))


class lmms(abc.ABC):
    """`lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Numbers become numbers, what is None is left out."""
        pairs = (part.split("=") for part in arg_string.split(","))
        args = {name: int(value) if value.isdecimal() else value for name, value in pairs}
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})


class BaseModel:
    """`vlmeval.vlm.base.BaseModel`."""

    INTERLEAVE = False
    allowed_types: Any = ["text", "image"]

    @abc.abstractmethod
    def generate_inner(self, message: Any, dataset: Any = None) -> Any:
        raise NotImplementedError

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def generate(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        assert all(item["type"] in self.allowed_types for item in message), "Invalid input type"
        answer: str = self.generate_inner(message, dataset)
        return answer


def install(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts both harnesses among the modules; returns VLMEvalKit's table of models."""
    table: dict[str, Any] = {}
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": table},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return table
