"""Training checkpoints to a model folder: `tokenthrift convert dllm_asr DRAFT.ckpt DENOISER.ckpt OUT`.

A checkpoint gives the parts it trained (draft head, or adapter and language model), so parts that were trained apart
are put together here, if they were trained with the same encoder. Checkpoints are read with `weights_only=True`, which
runs no code from the file. The authors' checkpoint is one file, see `released`.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift.config import from_plain
from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder, decoder_of
from tokenthrift.dllm_asr.released import is_released, released
from tokenthrift.dllm_asr.training.config import TrainingConfig
from tokenthrift.dllm_asr.training.module import DllmAsrModule
from tokenthrift.hub import HubModel

__all__ = ["autoregressive", "dllm_asr"]


def dllm_asr(checkpoints: Sequence[Path]) -> HubModel:
    """The model that checkpoints of `DllmAsrModule` make together; one that trained the denoiser names the sizes. Or
    that of the authors' checkpoint.

    Raises:
        ValueError: a file is no such checkpoint, or they are of unlike models.
    """
    if len(checkpoints) == 1 and is_released(checkpoints[0]):
        return released(checkpoints[0])
    return _merged(checkpoints).model.eval()


def autoregressive(checkpoints: Sequence[Path]) -> HubModel:
    """The baseline that a checkpoint of `AutoregressiveModule` makes."""
    model = _merged(checkpoints).model
    baseline = AutoregressiveDecoder(model.config, model.vocabulary)
    baseline.decoder.load_state_dict(decoder_of(model).state_dict())
    return baseline


def _merged(checkpoints: Sequence[Path]) -> DllmAsrModule:
    found = [_config(path) for path in checkpoints]
    chosen = next((i for i, config in enumerate(found) if config.train_denoiser), 0)
    encoders = [_encoder(path) for path in checkpoints]
    for path, encoder in zip(checkpoints, encoders, strict=True):
        if not _same(encoder, encoders[chosen]):
            raise ValueError(f"{path} was trained on another encoder than {checkpoints[chosen]}")
    try:
        module = DllmAsrModule(replace(found[chosen], start_from=[str(path) for path in checkpoints]))
        # A training that began with a model folder has that folder's encoder, whatever its `whisper` says.
        if encoders[chosen]:  # none where the encoder lies elsewhere
            module.model.encoder.load_state_dict(encoders[chosen])
        return module
    except RuntimeError as error:  # weights of other sizes
        names = ", ".join(map(str, checkpoints))
        raise ValueError(f"no model can be made of {names}: {error}") from error


def _encoder(path: Path) -> dict[str, Tensor]:
    state, prefix = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"], "model.encoder."
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _config(path: Path) -> TrainingConfig:
    """What a checkpoint was trained with; its weights are not read yet."""
    reason = f"{path} is no checkpoint of a dLLM-ASR training"
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, AttributeError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(reason) from error
    match data:
        case {
            "hyper_parameters": {"config": {"train_draft": bool(), "train_denoiser": bool()} as config},
            "state_dict": dict() as state,
        } if all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()):
            return from_plain(TrainingConfig, config, str(path))
    raise ValueError(reason)
