"""Which recogniser a model folder holds: the word `system` in its config.json, looked up in one table."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Final, cast

from tokenthrift.config import ConfigError, read_json
from tokenthrift.sources import fetch
from tokenthrift.transcript import Recogniser

__all__ = ["RECOGNISERS", "load_recogniser"]

RECOGNISERS: Final[dict[str, str]] = {
    "dllm_asr": "tokenthrift.dllm_asr:DllmAsr",
}
"""System to `module:class`; a class joins with a line here, and is imported only when a model asks for it."""


def load_recogniser(source: str | Path, device: str = "cpu") -> Recogniser:
    """Loads a speech model of any system.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        device: Where the model goes.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech, or its configuration is not valid.
        WeightsError: Its weights are not what the configuration says.
    """
    path = fetch(source, ("config.json",)) / "config.json"
    system = read_json(path).get("system")
    if system not in RECOGNISERS:
        raise ConfigError(f"{path}: system is {system!r}, but transcription needs one of {', '.join(RECOGNISERS)}")
    module, name = RECOGNISERS[system].split(":")
    model = getattr(importlib.import_module(module), name).from_pretrained(source, device=device)
    return cast(Recogniser, model)
