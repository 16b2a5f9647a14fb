"""The recogniser in a model folder or Hub repository, found by the word `system` in its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tokenthrift.config import ConfigError
from tokenthrift.models import model_class
from tokenthrift.sources import fetch
from tokenthrift.transcript import AudioVisualRecogniser, Recogniser

__all__ = ["load_recogniser"]


def load_recogniser(source: str | Path, device: str = "cpu") -> Recogniser | AudioVisualRecogniser:
    """Loads a speech model of any system.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        device: Where the model goes.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech, or its configuration is not valid.
        WeightsError: Its weights are not what the configuration says.
    """
    kind = model_class(fetch(source, ("config.json",)))
    if not all(hasattr(kind, name) for name in ("transcribe", "sample_rate", "max_seconds")):
        raise ConfigError(f"{source}: a model of {kind.__name__} does not write down speech")
    return cast(Recogniser | AudioVisualRecogniser, kind.from_pretrained(source, device=device))
