"""Small KARL trainings: sizes, images, and a run of some steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from tests import training_runs
from tests.training_runs import Notes
from tokenthrift.karl.config import BaseConfig, KarlConfig, TransformerConfig
from tokenthrift.karl.training.data import KarlDataModule
from tokenthrift.karl.training.module import KarlStage1Module, KarlStage2Module
from tokenthrift.training.optim import OptimConfig

SIZE, BATCH, TOKENS = 16, 4, 8
OPTIM = OptimConfig(learning_rate=3e-3, weight_decay=0.05, betas=(0.9, 0.95), warmup_steps=0, min_lr=1e-6)

Kind = Literal["vqgan", "vae"]


def base_of(kind: Kind) -> BaseConfig:
    return BaseConfig(
        kind=kind,
        patch_size=2,
        channels=16,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=8,
        norm_num_groups=4,
        codebook_size=16,
        scaling_factor=1.0,
    )


def model_of(kind: Kind = "vae", **changes: Any) -> KarlConfig:
    half = TransformerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = KarlConfig(
        base=base_of(kind), encoder=half, decoder=half, grid=(4, 4), max_tokens=TOKENS, token_dim=6, codebook_size=32
    )
    if "max_tokens" in changes:
        changes = {"max_position_embeddings": 0, **changes}
    return replace(config, **changes)


def stage(number: int, kind: Kind = "vae", **options: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"optim": OPTIM, "count_step": 1, "restart_every": 4}
    if number == 2:
        settings["lpips_weight"] = 0.0
    kinds: dict[int, Any] = {1: KarlStage1Module, 2: KarlStage2Module}
    return kinds[number](options.pop("config", model_of(kind)), **{**settings, **options})


def smooth_images(folder: Path) -> Path:
    """A pack of eight."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(8, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(rough, (SIZE, SIZE), mode="bilinear")
    path = folder / "images.npy"
    np.save(path, (images * 255).byte().numpy())
    return path


class Weights(L.Callback):
    """Notes the weights of one layer after every step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(pl_module.model.to_tokens.weight.detach().clone())


def fit(
    module: L.LightningModule,
    pack: Path,
    *callbacks: L.Callback,
    steps: int = -1,
    validate: bool = False,
    **options: Any,
) -> Notes:
    """A run, as `tests.training_runs.fit`, on a pack of images."""
    data = KarlDataModule(
        {str(pack): 1}, dev={"smooth": str(pack)}, size=SIZE, batch_size=BATCH, area=(0.9, 1.0), dev_images=4
    )
    epochs = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "limit_val_batches": 1 if validate else 0}
    own: dict[str, Any] = {**epochs, "log_every_n_steps": 1, "weights_only": False}
    return training_runs.fit(module, data, steps, *callbacks, **own, **options)[0]


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
