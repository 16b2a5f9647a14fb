"""The recognizer in a model folder or Hub repository: of one of our systems, or any speech model of transformers.

The word `system` in config.json says that it is one of ours, `model_type` that transformers knows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tokenthrift.config import ConfigError, read_json
from tokenthrift.models import model_class
from tokenthrift.sources import fetch
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer

__all__ = ["load_recognizer"]


def load_recognizer(
    source: str | Path,
    device: str = "cpu",
    revision: str | None = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
) -> Recognizer | AudioVisualRecognizer:
    """Loads a speech model of any system, or of transformers.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        device: Where the model goes.
        revision: Branch, tag or commit on the Hub.
        language: Of the speech, where the model can be told.
        task: "transcribe", or "translate" into English where the model can.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech, or its configuration is not valid.
        WeightsError: Its weights are not what the configuration says.
        ValueError: It takes no language, or does not translate.
    """
    folder = fetch(source, ("config.json",), revision=revision)
    fields = read_json(folder / "config.json")
    if "system" not in fields and "model_type" in fields:
        from tokenthrift.recognizers.loading import load_transformers

        return load_transformers(source, device=device, revision=revision, language=language, task=task)
    kind = model_class(folder)
    if not all(hasattr(kind, name) for name in ("transcribe", "sample_rate", "max_seconds")):
        raise ConfigError(f"{source}: a model of {kind.__name__} does not write down speech")
    if language is not None or task != "transcribe":
        option = f"language={language!r}" if language is not None else f"task={task!r}"
        raise ValueError(f"{option}: {kind.__name__} has one language and writes it down as it is")
    return cast(Recognizer | AudioVisualRecognizer, kind.from_pretrained(source, device=device, revision=revision))
