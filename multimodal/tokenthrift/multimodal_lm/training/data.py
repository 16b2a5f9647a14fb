"""Questions about media as training and test data; the files are those of `tokenthrift.multimodal_lm.questions`.

Source: Lightning's data modules. What differs: a resumed run goes on with the questions that would have come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tokenthrift.multimodal_lm.questions import Example, Questions
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import random_batches

__all__ = ["MultimodalDataModule"]


class MultimodalDataModule(ResumableDataModule):
    """Questions about media whose native tokens lie on disk; a batch is a list of `Example`.

    Args:
        folder: with `train`, `dev` and `test`.
        batch_size: questions of a batch on each device.
        others: share of the training prompts with media of all kinds.
        grids: frames, rows and columns of the items of a kind, as `{video: [8, 8, 8]}`.
        dev_questions: of the development part to validate on, evenly spread.
        seed: of order and draws.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 16,
        others: float = 0.25,
        grids: dict[str, list[int]] | None = None,
        dev_questions: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the parts."""
        h: Any = self.hparams
        root = Path(h.folder)
        self.train = Questions(root / "train", grids=h.grids, others=h.others, seed=h.seed)
        self.dev, self.test = (Questions(root / part, grids=h.grids) for part in ("dev", "test"))
        step = max(1, len(self.dev.rows) // h.dev_questions)
        self.dev.rows = self.dev.rows[::step]

    def train_dataloader(self) -> DataLoader[Any]:
        """Questions of every epoch in random order, from where this run begins."""
        h: Any = self.hparams
        sampler = random_batches(range(len(self.train)), h.batch_size, seed=h.seed)
        return self.training_loader(self.train, sampler, list)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same questions every time."""
        return self.evaluation_loader(self.dev, self.hparams["batch_size"], list)

    def test_dataloader(self) -> DataLoader[Any]:
        """Questions about items that neither training nor development saw."""
        return self.evaluation_loader(self.test, self.hparams["batch_size"], list)

    def transfer_batch_to_device(
        self, batch: list[Example], device: torch.device, dataloader_idx: int
    ) -> list[Example]:
        """The batch as it is: the model moves what it reads."""
        return batch
