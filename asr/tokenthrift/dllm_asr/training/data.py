"""Cached encoder states as training data, and real recordings for development.

The recipe's `features.py` writes the shards: safetensors files with `states` (fp16, 50 a second, all utterances end to
end), `offset`, and the texts in their metadata. Batches hold utterances of about one length and at most so many states
with padding. The order depends on seed and epoch alone, and a run that is resumed goes on with the batch after the
last.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.training.resuming import ResumableDataModule

__all__ = ["Batch", "BatchOrder", "CachedStates", "DllmAsrDataModule", "Utterance"]


STEP = 25  # states; utterances whose lengths differ by less share batches at random


@dataclass(frozen=True, slots=True)
class Utterance:
    """Encoder states `(n, width)`, the words spoken, and what the CTC head wrote, where that is known."""

    states: Tensor
    text: str
    draft: Sequence[DraftWord] = ()


@dataclass(slots=True)
class Batch:
    """Utterances side by side.

    Attributes:
        states: `(B, N, width)`, zero after each utterance.
        lengths: `(B,)` states of each.
        texts: the words spoken.
        seed: of whatever is random about the batch.
    """

    states: Tensor
    lengths: Tensor
    texts: list[str]
    drafts: list[Sequence[DraftWord]]
    seed: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(self.states.to(device), self.lengths.to(device), self.texts, self.drafts, self.seed)


def collate(items: list[Utterance]) -> Batch:
    """Pads utterances to the longest."""
    lengths = torch.tensor([len(i.states) for i in items])
    seed = hash(tuple(lengths.tolist())) & 0x7FFFFFFF
    states = pad_sequence([i.states.float() for i in items], batch_first=True)
    return Batch(states, lengths, [i.text for i in items], [i.draft for i in items], seed)


class CachedStates(Dataset[Utterance]):
    """Utterances of shards, read from disk when asked for.

    Args:
        shards: files written by `features.py`; `.drafts.json` beside one, by `drafts.py`, holds what the CTC head
            writes.
        limit: use only the first so many utterances.

    Raises:
        ValueError: a `.drafts.json` is of another number of utterances.
    """

    def __init__(self, shards: list[Path], limit: int | None = None) -> None:
        self.files: list[Any] = [safe_open(path, "pt") for path in shards]
        self.rows: list[tuple[int, int, int, str]] = []
        self.drafts: list[list[tuple[str, float, float, float]]] = []
        for i, file in enumerate(self.files):
            offset = file.get_tensor("offset").tolist()
            texts = json.loads(file.metadata()["texts"])
            self.rows += [(i, a, b, t) for a, b, t in zip(offset[:-1], offset[1:], texts, strict=True)]
            drafts = shards[i].with_suffix(".drafts.json")
            heard = json.loads(drafts.read_text()) if drafts.exists() else [[] for _ in texts]
            if len(heard) != len(texts):
                raise ValueError(f"{drafts} has drafts of {len(heard)} utterances, its shard has {len(texts)}")
            self.drafts += heard
        self.rows = self.rows[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Utterance:
        file, start, stop, text = self.rows[index]
        draft = [DraftWord(*word) for word in self.drafts[index]]
        return Utterance(self.files[file].get_slice("states")[start:stop], text, draft)

    @property
    def lengths(self) -> list[int]:
        """States of each utterance."""
        return [b - a for _, a, b, _ in self.rows]


class BatchOrder(Sampler[list[int]]):
    """Batches of utterances of like length, in a new seeded order each epoch.

    Args:
        lengths: states of each utterance.
        max_states: most states of a batch, padding included.
        seed: of the order.
    """

    def __init__(self, lengths: list[int], max_states: int, seed: int) -> None:
        self.lengths, self.max_states, self.seed = lengths, max_states, seed
        self.epoch = self.skip = 0
        self.count = len(self._batches(0))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(self.epoch)
        skip, self.skip = self.skip, 0
        self.epoch += 1
        yield from batches[skip:]

    def _batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(self.seed * 1_000_003 + epoch)
        # Lengths in steps: who shares a batch changes from epoch to epoch, how many batches there are does not.
        steps = [-(-length // STEP) * STEP for length in self.lengths]
        batches: list[list[int]] = []
        for i in sorted(range(len(steps)), key=lambda i: (steps[i], rng.random())):
            if not batches or steps[i] * (len(batches[-1]) + 1) > self.max_states:
                batches.append([])
            batches[-1].append(i)
        rng.shuffle(batches)
        return batches


class DllmAsrDataModule(ResumableDataModule):
    """Training shards, synthetic development shards, and real development recordings.

    Args:
        features: folder of cached shards; files named `dev-*` are for development.
        dev_recordings: folder with a `manifest.jsonl` of real recordings; encoded once, with the model's own encoder.
        max_states: most encoder states of a training batch, padding included.
        dev_utterances: most synthetic utterances to validate on.
        seed: of the order of the batches.
    """

    def __init__(
        self,
        features: str,
        dev_recordings: str | None = None,
        max_states: int = 8000,
        dev_utterances: int = 80,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Opens the shards."""
        h: Any = self.hparams
        shards = sorted(Path(h.features).glob("*.safetensors"))
        dev = [s for s in shards if s.name.startswith("dev-")]
        train = [s for s in shards if s not in dev]
        if not train:
            raise FileNotFoundError(
                f"no training shards (*.safetensors) in {h.features}; make them with recipes/dllm_asr/features.py"
            )
        self.train = CachedStates(train)
        self.order = BatchOrder(self.train.lengths, h.max_states, h.seed)
        # A spread over all voices, not the first shards only.
        random.Random(h.seed).shuffle(dev)
        self.dev: list[Any] = [CachedStates(dev, h.dev_utterances)] if dev else []
        if h.dev_recordings:
            self.dev.append(self._recordings(Path(h.dev_recordings)))

    def train_dataloader(self) -> DataLoader[Utterance]:
        """Batches of training utterances."""
        self.order.epoch, self.order.skip = divmod(self.consumed, len(self.order))
        return DataLoader(self.train, batch_sampler=self.order, collate_fn=collate)

    def val_dataloader(self) -> list[DataLoader[Utterance]]:
        """Synthetic development utterances, then real ones."""
        return [DataLoader(d, batch_size=8, collate_fn=collate) for d in self.dev]

    def _recordings(self, folder: Path) -> list[Utterance]:
        from tokenthrift.dllm_asr.training.module import DllmAsrModule
        from tokenthrift.media.audio import read_audio

        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, DllmAsrModule):
            raise TypeError("dev_recordings needs a DllmAsrModule, whose encoder reads them")
        out = []
        for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            states, _ = module.model.encode([read_audio(folder / row["audio_filepath"])])
            out.append(Utterance(states[0].half(), row["text"]))
        return out
