"""Resume with the random numbers that the interrupted run would have drawn.

Lightning's checkpoints hold weights, optimizers and progress but not the state of the generators, so dropout and
shuffling differ after a resume and the losses part. This callback adds the states of Python's and torch's global
generators to every checkpoint. A run that saves at the end of an epoch goes on exactly, shuffled loaders included; one
that saves in the middle of an epoch draws the same dropout, while going on with the right batch is up to its data.
"""

import random
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class RandomState(Callback):
    """Saves the global random states in checkpoints and restores them on resume."""

    def __init__(self) -> None:
        self._mid_epoch = False
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states as plain data and tensors, which a checkpoint can hold without pickled classes."""
        version, words, gauss = random.getstate()
        return {
            "python": [version, list(words), gauss],
            "torch": torch.random.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "mid_epoch": self._mid_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until everything is built."""
        self._loaded = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores before the next epoch's loader draws its order; `on_train_start` would be too late for that."""
        if self._loaded is not None:
            self._restore(self._loaded)
            if not self._loaded["mid_epoch"]:
                self._loaded = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores again in the middle of an epoch, where the interrupted run had no loader to start."""
        self._mid_epoch = True
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes where in the epoch a checkpoint would be made now."""
        self._mid_epoch = batch_idx + 1 < trainer.num_training_batches

    def _restore(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        torch.random.set_rng_state(state["torch"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
