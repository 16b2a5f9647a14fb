"""Frozen parts whose weights lie elsewhere: filled from the folder or Hub id that names them, left out of files.

A model that reads a published language model or encoder need not hold a copy of it: its folder names the source. The
tensors go straight into the model's own modules, so that no part is in memory twice. Low-rank adapters inside such a
part (keys with `lora_`, the projection they adapt under `base_layer`, as PEFT names them) are the model's own: they
stay in its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenthrift.sources import WeightsError, is_folder

__all__ = ["allow_missing", "assign_state", "drop_external_keys", "is_adapter", "resolved"]


def is_adapter(key: str) -> bool:
    """Whether a tensor of this name belongs to a low-rank adapter."""
    return ".lora_" in key


def assign_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Puts tensors in place of a module's own, in its precision and on its device, without a copy where both fit.
    A module without memory takes them as they are. Adapters keep what they have.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape. Nothing is changed then.
    """
    own = {key: value for key, value in module.state_dict().items() if not is_adapter(key)}
    names = {key: key.replace(".base_layer.", ".") for key in own}
    if isinstance(module, PreTrainedModel) and module.config.tie_word_embeddings:
        # A checkpoint may leave out what is tied; any name of the tied tensor serves.
        for tied, kept in (getattr(module, "all_tied_weights_keys", None) or {}).items():
            if names.get(tied) not in state and names.get(kept) in state:
                names[tied] = names[kept]
    used = set(names.values())
    problems = [f"{name} is missing" for name in names.values() if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in used and name not in own]
    problems += [
        f"{names[key]} is {list(state[names[key]].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if names[key] in state and state[names[key]].shape != value.shape
    ]
    if problems:
        raise WeightsError(f"{source} does not fit: {'; '.join(dict.fromkeys(problems[:10]))}")
    moved: dict[int, Tensor] = {}  # a tied tensor stays one tensor
    placed = {}
    for key, value in own.items():
        given = state[names[key]]
        placed[key] = moved.setdefault(id(given), given if value.is_meta else given.to(value))
    module.load_state_dict(placed, strict=False, assign=True)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()


def drop_external_keys(
    parts: Sequence[str], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object
) -> None:
    """A hook after `state_dict`: keeps parts that lie elsewhere out of files and checkpoints."""
    for part in parts:
        for key in [key for key in state if key.startswith(f"{prefix}{part}.") and not is_adapter(key)]:
            del state[key]


def allow_missing(parts: Sequence[str], module: nn.Module, incompatible: Any) -> None:
    """A hook after `load_state_dict`: what `drop_external_keys` left out is not missing."""
    incompatible.missing_keys[:] = [
        key
        for key in incompatible.missing_keys
        if is_adapter(key) or not any(f".{part}." in f".{key}" for part in parts)
    ]


def resolved(source: str, base_dir: Path | None) -> str | Path:
    """A folder beside `base_dir` where there is one of that name; the name as it is otherwise."""
    beside = None if base_dir is None else base_dir / source
    return source if beside is None or not is_folder(beside) else beside
