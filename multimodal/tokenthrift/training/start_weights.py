"""Weights that a training begins with: those of an earlier training, or of a model.

Weights are named as in a LightningModule that holds its model as `model`, which all four systems do. The schedule and
the optimizer start anew; to go on with an interrupted run, give its checkpoint to `--ckpt_path` instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenthrift.sources import fetch
from tokenthrift.weights import unique_tensors

__all__ = ["StartWeights", "load_start_weights", "read_start_weights"]

MODEL = "model."


@dataclass(frozen=True, slots=True)
class StartWeights:
    """What a source holds.

    Attributes:
        tensors: by their names in a LightningModule, those of a model with `model.` before.
        options: hyper-parameters of a training checkpoint; empty for a model folder.
        config: config.json of a model folder; empty for a training checkpoint.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    config: dict[str, Any]


def read_start_weights(source: str | Path) -> StartWeights:
    """Reads a training checkpoint (`.ckpt`), or the model of a folder or of `owner/name` on the Hub.

    Raises:
        OSError: there is no such file or model.
        ValueError: the file is no training checkpoint.
    """
    if Path(source).suffix == ".ckpt":
        saved = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or "state_dict" not in saved:
            raise ValueError(f"{source} is no checkpoint of a training: it has no state_dict")
        return StartWeights(saved["state_dict"], dict(saved.get("hyper_parameters", {})), {})
    from safetensors.torch import load_file

    folder = fetch(source, ("config.json", "model.safetensors"))
    tensors = {f"{MODEL}{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return StartWeights(tensors, {}, json.loads((folder / "config.json").read_text(encoding="utf-8")))


def load_start_weights(
    module: nn.Module,
    source: str | Path | StartWeights,
    *,
    keep: Callable[[str], bool] | None = None,
    allow_missing: bool = True,
) -> set[str]:
    """Fills a LightningModule, or a part of one, with the weights of a source.

    Args:
        module: to fill.
        source: see `read_start_weights`, or what it read.
        keep: takes a tensor by its name in the source, or leaves it.
        allow_missing: tensors of the module that the source lacks stay as they are.

    Returns:
        The names that were filled.

    Raises:
        ValueError: the source has tensors that the module lacks, or of other sizes, or too few. Nothing is filled then.
    """
    found = source if isinstance(source, StartWeights) else read_start_weights(source)
    named = "the weights to start from" if isinstance(source, StartWeights) else str(source)
    tensors = {name: tensor for name, tensor in found.tensors.items() if keep is None or keep(name)}
    own = module.state_dict()
    if unknown := [name for name in tensors if name not in own]:
        raise ValueError(f"{named}: of another model, it has {_some(unknown)}")
    sizes = [
        f"{name} is {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != own[name].shape
    ]
    if sizes:
        raise ValueError(f"{named}: of a model of other sizes, {_some(sizes)}")
    missing = [name for name in unique_tensors(module) if name not in tensors]  # tied ones are stored once
    if missing and not allow_missing:
        raise ValueError(f"{named}: it lacks {_some(missing)}")
    module.load_state_dict(tensors, strict=False)
    return set(tensors)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
