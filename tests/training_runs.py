"""Training runs of the tests: on the CPU, quiet, with notes of every step, resumed from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class Notes(L.Callback):
    """Notes of every step its loss, the learning rate, and an attribute of the batch, such as its texts.

    Args:
        attribute: of the batch; nothing is noted of it if not given.
    """

    def __init__(self, attribute: str | None = None) -> None:
        self.attribute = attribute
        self.losses: list[Any] = []
        self.rates: list[float] = []
        self.seen: list[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Lightning calls it. A step that gave no loss is noted as None."""
        self.losses.append(outputs["loss"].item() if outputs else None)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self.attribute is not None:
            self.seen.append(list(getattr(batch, self.attribute)))


def quiet_trainer(
    steps: int, *callbacks: L.Callback, folder: Path | None = None, every: int = 3, **options: Any
) -> L.Trainer:
    """A Trainer that shows and logs nothing, and validates after the last step.

    Args:
        steps: of the run; -1 for as many as its epochs have.
        callbacks: in their order.
        folder: where checkpoints go, as step=N.ckpt; none are written without.
        every: of how many steps the last has a checkpoint.
        options: of the Trainer, in place of these.
    """
    saving = [] if folder is None else [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)]
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in [*callbacks, *saving]),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "val_check_interval": steps if steps > 0 else 1.0,
        "check_val_every_n_epoch": None if steps > 0 else 1,
    }
    return L.Trainer(callbacks=[*callbacks, *saving], **{**usual, **options})


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    steps: int,
    *callbacks: L.Callback,
    resume: Path | str | None = None,
    attribute: str | None = None,
    weights_only: bool | None = None,
    **options: Any,
) -> tuple[Notes, L.Trainer]:
    """One run.

    Args:
        module: what is trained.
        data: on what.
        steps: as in `quiet_trainer`.
        callbacks: beside the notes.
        resume: a checkpoint to go on from.
        attribute: of the batches, to be noted.
        weights_only: of the checkpoint, as Lightning takes it.
        options: as in `quiet_trainer`.

    Returns:
        The notes, and the Trainer after the run.
    """
    notes = Notes(attribute)
    trainer = quiet_trainer(steps, notes, *callbacks, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=weights_only)
    return notes, trainer
