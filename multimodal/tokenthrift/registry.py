"""The systems of this release: one table of what each brings, and nothing imported before it is needed.

A model's folder says in its `config.json` which system it is of, by the name in this table. A new system is a subclass
of `tokenthrift.hub.HubModel` and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from tokenthrift.extras import naming_extras

__all__ = ["SYSTEMS", "System", "resolve", "those_with"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What a system brings, each as `module:name`.

    Attributes:
        name: the word in `config.json`.
        model: a subclass of `HubModel`; none for a part of a model that is only converted.
        converter: makes something with `save_pretrained` of a list of checkpoint files.
        converts_folders: whether the converter also takes a folder of a published checkpoint.
        files: how the model reads files, see `tokenthrift.tokenize`.
        evaluator: takes the arguments of `tokenthrift evaluate NAME` and returns an exit code.
        prefix: how the model stands in front of a language model, see `tokenthrift.prefixes`.
    """

    name: str
    model: str | None = None
    converter: str | None = None
    converts_folders: bool = False
    files: str | None = None
    evaluator: str | None = None
    prefix: str | None = None


SYSTEMS: Final[dict[str, System]] = {
    system.name: system
    for system in (
        System(
            name="dllm_asr",
            model="tokenthrift.dllm_asr:DllmAsr",
            converter="tokenthrift.dllm_asr.convert:dllm_asr",
            files="tokenthrift.transcription.files:SpeechFiles",
            prefix="tokenthrift.dllm_asr.prefix:DllmAsrPrefix",
        ),
        System(
            name="dllm_asr_autoregressive",
            model="tokenthrift.dllm_asr.autoregressive:AutoregressiveDecoder",
            converter="tokenthrift.dllm_asr.convert:autoregressive",
        ),
        System(
            name="mtsk",
            model="tokenthrift.mtsk:LlamaMtsk",
            converter="tokenthrift.mtsk.convert:mtsk",
            files="tokenthrift.transcription.files:SpeechFiles",
            evaluator="tokenthrift.mtsk.evaluation.command:main",
            prefix="tokenthrift.mtsk.prefix:MtskPrefix",
        ),
        System(name="avhubert", converter="tokenthrift.mtsk.convert:avhubert"),
        System(
            name="karl",
            model="tokenthrift.karl:Karl",
            converter="tokenthrift.karl.convert:karl",
            files="tokenthrift.karl.files:ImageFiles",
            evaluator="tokenthrift.karl.evaluation.command:main",
            prefix="tokenthrift.karl.prefix:KarlPrefix",
        ),
        System(
            name="vqtoken",
            model="tokenthrift.vqtoken:VQToken",
            converter="tokenthrift.vqtoken.convert:vqtoken",
            converts_folders=True,
            files="tokenthrift.vqtoken.files:VideoFiles",
            evaluator="tokenthrift.vqtoken.evaluation.command:main",
        ),
        System(
            name="vqtoken_answerer",
            model="tokenthrift.vqtoken:VideoAnswerer",
            files="tokenthrift.vqtoken.files:VideoFiles",
            prefix="tokenthrift.vqtoken.video_lm.prefix:VideoPrefix",
        ),
        System(
            name="multimodal_lm",
            model="tokenthrift.multimodal_lm:MultimodalLM",
            converter="tokenthrift.multimodal_lm.convert:multimodal",
            evaluator="tokenthrift.multimodal_lm.evaluate:main",
        ),
    )
}
"""By name."""


def resolve(target: str) -> Any:
    """Imports what `module:name` stands for.

    Raises:
        MissingExtraError: the module is for those who installed an extra, and it is not installed.
    """
    module, _, name = target.partition(":")
    with naming_extras():
        return getattr(import_module(module), name)


def those_with(part: str) -> dict[str, str]:
    """Systems that bring a part ("model", "converter", "files", "evaluator", "prefix"), and its target."""
    return {name: target for name, system in SYSTEMS.items() if (target := getattr(system, part)) is not None}
