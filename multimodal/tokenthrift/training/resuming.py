"""Data that go on after the last batch used, when a run is resumed in the middle of an epoch.

What differs from Lightning: it restarts the epoch's data on a resume; here a checkpoint holds how many batches were
used, and a data module starts its loader there.
"""

from __future__ import annotations

from typing import Any

import lightning as L


class ResumableDataModule(L.LightningDataModule):
    """A data module that knows how many training batches each device has used.

    Attributes:
        consumed: that many at the start of this run; `train_dataloader` has to begin after them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been used by each device."""
        trainer = self.trainer
        return {"consumed": trainer.fit_loop.epoch_loop.total_batch_idx + 1 if trainer else self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after that many batches."""
        self.consumed = int(state["consumed"])
