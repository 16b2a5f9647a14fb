"""The weights that a training checkpoint trained, without those that it was given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenthrift.training.start_weights import StartWeights, read_start_weights

__all__ = ["DRAFT", "trained_weights"]

DRAFT = "model.draft."
DENOISER = ("model.adapter.", "model.backbone.")


def trained_weights(source: str | Path) -> StartWeights:
    """The weights that a training checkpoint trained, or all of a model folder, by their names in a `DllmAsrModule`.

    Raises:
        ValueError: a checkpoint of another training.
    """
    found = read_start_weights(source)
    if not found.options:
        return found
    trained = _trained_parts(source, found.options)
    return replace(found, tensors={name: t for name, t in found.tensors.items() if name.startswith(trained)})


def _trained_parts(source: str | Path, options: dict[str, Any]) -> tuple[str, ...]:
    match options:
        case {"config": {"train_draft": bool(draft), "train_denoiser": bool(denoiser)}}:
            return (*([DRAFT] if draft else []), *(DENOISER if denoiser else ()))
    raise ValueError(f"{source} is no checkpoint of a dLLM-ASR training")
