"""The parts of a model that are frozen, and may lie elsewhere: filled from where they are named, left out of files.

Source: Llama-MTSK (arXiv 2503.06362), section 3: encoders and language model are never trained. What differs: the
published checkpoints hold a copy of all of them; here a model's folder may name them by folder or Hub id instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from safetensors.torch import load_file
from torch import Tensor, nn

from tokenthrift.mtsk.config import MTSKConfig
from tokenthrift.mtsk.language_model import load
from tokenthrift.sources import fetch, is_folder
from tokenthrift.whisper import encoder_weights

if TYPE_CHECKING:
    from tokenthrift.mtsk.model import LlamaMTSK

__all__ = ["fill", "forget", "not_missing", "untrained"]

# By the field of the configuration that describes each.
_PARTS: Final = {"language_model": "language_model", "audio": "audio_encoder", "video": "video_encoder"}


def untrained(model: LlamaMTSK) -> Iterator[nn.Module]:
    """The parts of which nothing is trained."""
    for name in _PARTS.values():
        part: nn.Module | None = getattr(model, name)
        if part is not None and not any(p.requires_grad for p in part.parameters()):
            yield part


def fill(model: LlamaMTSK, **options: Any) -> None:
    """Fills the parts that the configuration names by folder or Hub id; a relative folder is looked for at home first.

    Args:
        model: to be filled.
        options: of the Hub's client: `cache_dir`, `token`, `local_files_only`.

    Raises:
        SourceError, ValueError: a name leads nowhere, or to other sizes.
    """
    config = model.config
    if config.language_model.source is not None:
        lm = load(_at_home(model, config.language_model.source), config.language_model, **options)
        model.language_model.load_state_dict(lm.state_dict())
    if model.audio_encoder is not None and config.audio is not None and config.audio.source is not None:
        folder = fetch(_at_home(model, config.audio.source), ("model.safetensors",), **options)
        model.audio_encoder.load_state_dict(encoder_weights(load_file(folder / "model.safetensors")))
    if model.video_encoder is not None and config.video is not None and config.video.source is not None:
        folder = fetch(_at_home(model, config.video.source), ("avhubert.safetensors",), **options)
        model.video_encoder.load_state_dict(load_file(folder / "avhubert.safetensors"))


def forget(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """A hook after `state_dict`: keeps the parts that lie elsewhere out of files and checkpoints."""
    for part in _elsewhere(cast("LlamaMTSK", module).config):
        for key in [key for key in state if key.startswith(f"{prefix}{part}.")]:
            del state[key]


def not_missing(module: nn.Module, incompatible: Any) -> None:
    """A hook after `load_state_dict`: what `forget` left out is not missed."""
    parts = set(_elsewhere(cast("LlamaMTSK", module).config))
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if parts.isdisjoint(k.split("."))]


def _elsewhere(config: MTSKConfig) -> list[str]:
    return [part for name, part in _PARTS.items() if getattr(getattr(config, name), "source", None) is not None]


def _at_home(model: LlamaMTSK, source: str) -> str | Path:
    beside = None if model.home is None else model.home / source
    return source if beside is None or not is_folder(beside) else beside
