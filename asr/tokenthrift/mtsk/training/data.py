"""Training data of Llama-MTSK: which clips train, which validate, and batches by frames.

Source: Llama-MTSK (arXiv 2503.06362) for the batches: lengths in frames of 25 a second, 400 linear bins, filled up to a
number of frames, batches in a random order. What differs: development clips are never test clips (one in fifty of the
training texts where no development set is named; the published code validates on the test set), the order is seeded and
dealt out to processes, and a resumed run goes on with the batch and the augmentation that would have come.
"""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tokenthrift.mtsk.training.augmentation import Augmentation
from tokenthrift.mtsk.training.clips import UNREADABLE, CachedStates, Clip, ManifestClips, collate, open_clips
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import Key, bucketed_batches

__all__ = ["MtskDataModule", "held_out"]

BINS = 400


def held_out(texts: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Indices of training and of development items: equal texts go to the same side, by their checksum.

    Args:
        texts: of all items.
        share: of the development items.
    """
    chosen = [zlib.crc32(text.encode()) < share * 2**32 for text in texts]
    return [i for i, dev in enumerate(chosen) if not dev], [i for i, dev in enumerate(chosen) if dev]


class _Part(Dataset[Clip]):
    """Some items of a data set; those that cannot be read are left out of their batches."""

    def __init__(self, whole: ManifestClips | CachedStates, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices
        self.broken: set[int] = set()
        frames = whole.frames
        self.frames = [frames[i] for i in indices]
        self.texts = [whole.texts[i] for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | Key) -> Clip:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.whole[epoch, self.indices[index]]

    def __getitems__(self, keys: Sequence[int | Key]) -> list[Clip]:
        """What can be read of a batch.

        Raises:
            ValueError: by now every item was tried, and none could be read.
        """
        clips = []
        for key in keys:
            index = key[1] if isinstance(key, tuple) else key
            if index in self.broken:
                continue
            try:
                clips.append(self[key])
            except UNREADABLE as error:
                self.broken.add(index)
                if len(self.broken) == len(self):
                    raise ValueError(f"none of {len(self)} items can be read; the last one: {error}") from error
                warnings.warn(f"left out: {error} ({len(self.broken)} of {len(self)} items so far)", stacklevel=2)
        return clips


class MtskDataModule(ResumableDataModule):
    """Training and development clips. A clip whose files cannot be read is named in a warning, counted and left out.

    A batch is a `Batch`: B texts, and for each stream that all of its items have either B recordings, as
    `LlamaMtsk.encode` takes them, or padded encoder states (B, N, D) with their lengths (B,). A batch of which no file
    can be read is empty.

    Args:
        train: a manifest, or a folder of shards of states.
        dev: the same for development; one in fifty of the training texts if not given. Never the test set.
        noise: folders of noise for clips of a manifest; files named `rir*` are impulse responses of rooms.
        max_frames: most frames (25 a second) of a training batch with its padding, for each process.
        crop: side of the mouth crop that the encoder reads.
        dev_items: most items to validate on.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        train: str,
        dev: str | None = None,
        noise: list[str] | None = None,
        max_frames: int = 1000,
        crop: int = 88,
        dev_items: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the data."""
        h: Any = self.hparams
        augmentation = Augmentation.from_folders(h.noise or [])
        whole = open_clips(h.train, augmentation, h.crop, h.seed)
        if h.dev is None:
            chosen, others = held_out(whole.texts, 0.02)
            plain = open_clips(h.train, None, h.crop, h.seed)
            self.train, self.dev = _Part(whole, chosen), _Part(plain, others[: h.dev_items])
        else:
            plain = open_clips(h.dev, None, h.crop, h.seed)
            self.train = _Part(whole, range(len(whole)))
            self.dev = _Part(plain, random.Random(h.seed).sample(range(len(plain)), min(h.dev_items, len(plain))))
        opened = [data for data in (whole, plain) if isinstance(data, CachedStates)]
        self.trailing_silences = {data.trailing_silence for data in opened} - {None}
        frames = self.train.frames
        bucket = max(1, -(-(max(frames) - min(frames)) // BINS))
        self.sampler = bucketed_batches(frames, h.max_frames, seed=h.seed, bucket=bucket)

    def train_dataloader(self) -> DataLoader[Clip]:
        """Augmented batches of like length within the budget of frames."""
        return self.training_loader(self.train, self.sampler, collate)

    def val_dataloader(self) -> DataLoader[Clip]:
        """Development clips as they are."""
        return self.evaluation_loader(self.dev, 16, collate)
