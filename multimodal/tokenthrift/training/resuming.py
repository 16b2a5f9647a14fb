"""Data modules that deal items out to all processes and go on after the last batch used.

What differs from Lightning: it restarts the epoch's data on a resume in the middle of one, and raises on batch samplers
that are not torch's own as soon as there are several processes. Here a checkpoint holds the epoch and the step, and a
loader takes whole batches of keys from a `ResumableBatchSampler`, which Lightning leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from tokenthrift.training.sampler import Key, ResumableBatchSampler, ordered_batches

__all__ = ["ResumableDataModule", "batch_loader"]


class _Batches(Dataset[Any]):
    """Whole batches of a data set, by lists of keys."""

    def __init__(self, items: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.items, self.collate_fn = items, collate_fn

    def __getitem__(self, keys: list[Key]) -> Any:
        read = getattr(self.items, "__getitems__", None)
        return self.collate_fn(read(keys) if read is not None else [self.items[key] for key in keys])


def _as_it_is(batch: Any) -> Any:
    return batch


def batch_loader(
    items: Any, sampler: ResumableBatchSampler, collate_fn: Callable[[list[Any]], Any], workers: int = 0
) -> DataLoader[Any]:
    """A loader of the batches that a sampler names.

    Args:
        items: takes a key `(epoch, index)`, or a list of them by `__getitems__`.
        sampler: names the batches.
        collate_fn: makes a batch of items.
        workers: processes that read; 0 reads in this one.
    """
    return DataLoader(
        _Batches(items, collate_fn),
        batch_size=None,
        sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


class ResumableDataModule(L.LightningDataModule):
    """A data module that goes on after the last batch used; `train_dataloader` returns a `training_loader`.

    Attributes:
        position: epoch and step at which this run begins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.position = (0, 0)
        self._sampler: ResumableBatchSampler | None = None

    def training_loader(
        self,
        items: Any,
        sampler: ResumableBatchSampler,
        collate_fn: Callable[[list[Any]], Any],
        workers: int = 0,
    ) -> DataLoader[Any]:
        """A loader that begins where this run does; see `batch_loader`."""
        sampler.start(*self.position)
        self._sampler = sampler
        return batch_loader(items, sampler, collate_fn, workers)

    @staticmethod
    def evaluation_loader(
        items: Any, batch_size: int, collate_fn: Callable[[list[Any]], Any], workers: int = 0
    ) -> DataLoader[Any]:
        """All items in order, each once and dealt out to the processes; keys are `(0, index)`.

        Raises:
            ValueError: there are no items.
        """
        return batch_loader(items, ordered_batches(len(items), batch_size), collate_fn, workers)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step of the batch that comes next."""
        if self._sampler is None or self.trainer is None or self.trainer.fit_loop.epoch_loop.total_batch_idx < 0:
            epoch, step = self.position
            return {"epoch": epoch, "step": step}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done: Any = progress.current
        if progress.is_last_batch and done.processed == done.ready:
            return {"epoch": self._sampler.current_epoch + 1, "step": 0}
        return {"epoch": self._sampler.current_epoch, "step": done.processed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there."""
        if "consumed" in state:  # a checkpoint of release 0.1.0 counts the batches of all epochs
            state = {"epoch": 0, "step": state["consumed"]}
        self.position = (int(state["epoch"]), int(state["step"]))
