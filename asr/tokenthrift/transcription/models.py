"""The recognizer in a model folder or Hub repository: of one of our systems, any speech model of transformers,
or a Whisper of CTranslate2.

The word `system` in config.json says that it is one of ours, `model_type` that transformers knows it, `suppress_ids`
that CTranslate2 does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenthrift.config import ConfigError, read_json
from tokenthrift.sources import fetch
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer

__all__ = ["load_recognizer", "of_ctranslate2", "recognizer_class"]


def of_ctranslate2(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model of CTranslate2."""
    return not {"system", "model_type"} & fields.keys() and "suppress_ids" in fields


def recognizer_class(source: str | Path, revision: str | None = None) -> type[Any]:
    """The class of what `load_recognizer` would load, by config.json alone: no weights are fetched.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech.
    """
    folder = fetch(source, ("config.json",), revision=revision)
    fields = read_json(folder / "config.json")
    if of_ctranslate2(fields):
        from tokenthrift.recognizers.whisper_ctranslate2 import CTranslate2Recognizer

        return CTranslate2Recognizer
    if "system" not in fields and "model_type" in fields:
        from tokenthrift.recognizers.loading import adapter_class

        return adapter_class(fields["model_type"], str(source))
    return _own_class(source, folder)


def _own_class(source: str | Path, folder: Path) -> type[Any]:
    from tokenthrift.models import model_class

    kind = model_class(folder)
    if not all(hasattr(kind, name) for name in ("transcribe", "sample_rate", "max_seconds")):
        raise ConfigError(f"{source}: a model of {kind.__name__} does not write down speech")
    return kind


def load_recognizer(
    source: str | Path,
    device: str = "cpu",
    revision: str | None = None,
    *,
    language: str | None = None,
    task: str = "transcribe",
    precision: str | None = None,
    threads: int | None = None,
) -> Recognizer | AudioVisualRecognizer:
    """Loads a speech model of any system, or of transformers.

    Args:
        source: A folder, or `owner/name` on the Hugging Face Hub.
        device: Where the model goes.
        revision: Branch, tag or commit on the Hub.
        language: Of the speech, where the model takes it.
        task: "transcribe", or "translate" into English where the model can.
        precision: "float32", or "int8" for linear layers in 8 bits on a processor; None for the model's own.
        threads: Of CTranslate2 on a processor; the others take PyTorch's number.

    Raises:
        SourceError: The source leads nowhere.
        ConfigError: It holds no model that writes down speech, or its configuration is not valid.
        WeightsError: Its weights are not what the configuration says.
        ValueError: It takes no language, or does not translate.
    """
    folder = fetch(source, ("config.json",), revision=revision)
    fields = read_json(folder / "config.json")
    if of_ctranslate2(fields):
        from tokenthrift.recognizers.whisper_ctranslate2 import load_ctranslate2

        return load_ctranslate2(
            source,
            device=device,
            revision=revision,
            language=language,
            task=task,
            precision=precision,
            threads=threads,
        )
    from tokenthrift.recognizers.precision import with_precision

    if "system" not in fields and "model_type" in fields:
        from tokenthrift.recognizers.loading import load_transformers

        found = load_transformers(source, device=device, revision=revision, language=language, task=task)
        return with_precision(found, found.model, precision)
    kind = _own_class(source, folder)
    if language is not None or task != "transcribe":
        option = f"language={language!r}" if language is not None else f"task={task!r}"
        raise ValueError(f"{option}: {kind.__name__} has one language and writes it down as it is")
    model: Any = kind.from_pretrained(source, device=device, revision=revision)
    return with_precision(model, model, precision)
