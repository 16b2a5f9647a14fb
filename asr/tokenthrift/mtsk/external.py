"""Frozen parts whose weights lie elsewhere: loaded from the folder or Hub id that names them, left out of files.

Source: Llama-MTSK (arXiv 2503.06362), section 3: encoders and language model are never trained. What differs: the
published checkpoints hold a copy of all of them; here a model's folder may name them by folder or Hub id instead. Their
tensors go straight into the model's own modules, so that no part is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenthrift.external import allow_missing, assign_state, drop_external_keys, resolved
from tokenthrift.mtsk.config import MtskConfig
from tokenthrift.mtsk.language_model import describe, read_weights
from tokenthrift.sources import fetch
from tokenthrift.whisper import encoder_weights

__all__ = [
    "AVHUBERT_FILE",
    "PARTS",
    "miss_external",
    "leave_out_external",
    "external_sources",
    "include_external",
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
        module, source = modules[name], resolved(named, base_dir)
        if isinstance(module, PreTrainedModel):
            state = read_weights(source, describe(module.config), **options)
        elif name == "audio_encoder":
            file = "model.safetensors"
            state = encoder_weights(load_file(fetch(source, (file,), **options) / file))
        else:
            state = load_file(fetch(source, (AVHUBERT_FILE,), **options) / AVHUBERT_FILE)
        assign_state(module, state, named)


def include_external(config: MtskConfig) -> MtskConfig:
    """The configuration of a model that keeps all its parts in its own files."""
    own = {name: replace(part, source=None) for name in PARTS if (part := getattr(config, name)) is not None}
    return replace(config, **own)


def leave_out_external(model: Any, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """A hook after `state_dict`: parts that lie elsewhere stay out of files and checkpoints."""
    drop_external_keys(tuple(external_sources(model.config)), model, state, prefix, metadata)


def miss_external(model: Any, incompatible: Any) -> None:
    """A hook after `load_state_dict`: what `leave_out_external` left out is not missing."""
    allow_missing(tuple(external_sources(model.config)), model, incompatible)
