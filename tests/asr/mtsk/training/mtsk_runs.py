"""Small trainings of Llama-MTSK: a module from parts, a run of some steps, and weights to compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tests import training_runs
from tests.training_runs import Notes
from tokenthrift.mtsk import MtskDataModule, MtskModule
from tokenthrift.mtsk.training.assembly import AssemblyConfig
from tokenthrift.training.optim import OptimConfig

TEXTS = ["the lazy dog", "a fox", "five six seven", "there is", "no", "one two", "lay red now", "set blue again"]


def module_of(parts: dict[str, str], **options: Any) -> MtskModule:
    """A module with a language model that is trained and kept."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "audio_rates": (2, 6),
        "video_rates": (1, 3),
        "bottleneck": 4,
        "projector_hidden_size": 32,
        "include_frozen": True,
        "train_language_model": True,
    }
    return MtskModule(**options_of({**settings, **parts, **options}))


def options_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `MtskModule` from the fields of its configuration beside the others."""
    names = {field.name for field in dataclasses.fields(AssemblyConfig)}
    config = AssemblyConfig(**{name: value for name, value in flat.items() if name in names})
    more = {name: value for name, value in flat.items() if name not in names}
    return {"config": config, "optim": OptimConfig(learning_rate=4e-3, weight_decay=0.1), **more}


def fit(
    module: MtskModule, states: Path, steps: int, folder: Path | None = None, **options: Any
) -> tuple[Notes, L.Trainer]:
    """A run; with a `folder`, a checkpoint of every third step."""
    data = MtskDataModule(str(states), str(states), max_frames=100)
    return training_runs.fit(module, data, steps, folder=folder, **options)


def weights_of(module: MtskModule, *parts: str) -> dict[str, Tensor]:
    return {n: v.clone() for n, v in module.model.state_dict().items() if n.startswith(parts)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
