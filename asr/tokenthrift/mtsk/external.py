"""Frozen parts whose weights lie elsewhere: loaded from the folder or Hub id that names them, left out of files.

Source: Llama-MTSK (arXiv 2503.06362), section 3: encoders and language model are never trained. What differs: the
published checkpoints hold a copy of all of them; here a model's folder may name them by folder or Hub id instead. Their
tensors go straight into the model's own modules, so that no part is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenthrift.mtsk.config import MtskConfig
from tokenthrift.mtsk.language_model import describe, read_weights
from tokenthrift.sources import WeightsError, fetch, is_folder
from tokenthrift.whisper import encoder_weights

__all__ = [
    "AVHUBERT_FILE",
    "PARTS",
    "allow_missing",
    "assign_weights",
    "drop_external_keys",
    "external_sources",
    "load_external",
]

AVHUBERT_FILE: Final = "avhubert.safetensors"
PARTS: Final = {"language_model": "language_model", "audio": "audio_encoder", "video": "video_encoder"}
"""The modules that may lie elsewhere, by the field of the configuration that describes each."""


def external_sources(config: MtskConfig) -> dict[str, str]:
    """The modules that lie elsewhere, and the folder or Hub id of each."""
    found = {part: getattr(getattr(config, name), "source", None) for name, part in PARTS.items()}
    return {part: source for part, source in found.items() if source is not None}


def load_external(
    modules: Mapping[str, nn.Module], sources: Mapping[str, str], base_dir: Path | None = None, **options: Any
) -> None:
    """Fills modules from where their weights lie.

    Args:
        modules: by the names in `PARTS`.
        sources: folder or Hub id of those to be filled.
        base_dir: where a relative folder is looked for first.
        options: of the Hub's client: `cache_dir`, `token`, `local_files_only`.

    Raises:
        SourceError, ValueError: a name leads nowhere, or to other sizes.
    """
    for name, named in sources.items():
        module, source = modules[name], _resolved(named, base_dir)
        if isinstance(module, PreTrainedModel):
            state = read_weights(source, describe(module.config), **options)
        elif name == "audio_encoder":
            file = "model.safetensors"
            state = encoder_weights(load_file(fetch(source, (file,), **options) / file))
        else:
            state = load_file(fetch(source, (AVHUBERT_FILE,), **options) / AVHUBERT_FILE)
        assign_weights(module, state, named)


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors in place of a module's own, in its precision and on its device, without a copy where both fit.
    A module without memory takes them as they are.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape. Nothing is changed then.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        raise WeightsError(f"{source} does not fit: {'; '.join(problems[:10])}")
    moved: dict[int, Tensor] = {}  # a tied tensor stays one tensor
    placed = {}
    for name, value in own.items():
        given = state[name]
        placed[name] = moved.setdefault(id(given), given if value.is_meta else given.to(value))
    module.load_state_dict(placed, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def drop_external_keys(
    parts: Sequence[str], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """A hook after `state_dict`: keeps parts that lie elsewhere out of files and checkpoints."""
    for part in parts:
        for key in [key for key in state if key.startswith(f"{prefix}{part}.")]:
            del state[key]


def allow_missing(parts: Sequence[str], module: nn.Module, incompatible: Any) -> None:
    """A hook after `load_state_dict`: what `drop_external_keys` left out is not missing."""
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not {*parts}.intersection(k.split("."))]


def _resolved(source: str, base_dir: Path | None) -> str | Path:
    beside = None if base_dir is None else base_dir / source
    return source if beside is None or not is_folder(beside) else beside
