"""The recognizer in a model folder or Hub repository, found by the word `system` in its config.json."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tokenthrift.config import ConfigError
from tokenthrift.models import model_class
from tokenthrift.sources import fetch
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer

__all__ = ["load_recognizer"]


def load_recognizer(
    source: str | Path, device: str = "cpu", revision: str | None = None
) -> Recognizer | AudioVisualRecognizer:
    """Loads a speech model of any system.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        device: Where the model goes.
        revision: Branch, tag or commit on the Hub.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech, or its configuration is not valid.
        WeightsError: Its weights are not what the configuration says.
    """
    kind = model_class(fetch(source, ("config.json",), revision=revision))
    if not all(hasattr(kind, name) for name in ("transcribe", "sample_rate", "max_seconds")):
        raise ConfigError(f"{source}: a model of {kind.__name__} does not write down speech")
    return cast(Recognizer | AudioVisualRecognizer, kind.from_pretrained(source, device=device, revision=revision))
