"""Cached encoder states as training data, and real recordings for development.

The recipe's `features.py` writes the shards: safetensors files with `states` (fp16, 50 a second, all utterances end to
end), `offset`, and the texts in their metadata. Batches hold utterances of about one length and at most so many states
with padding. The order depends on seed and epoch alone, and a run that is resumed goes on with the batch after the
last. What training draws for an utterance depends on the seed, the epoch and the utterance.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.dllm_asr.training.batch import Recording, Utterance, collate, collate_audio
from tokenthrift.media.audio import read_audio
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import Key, bucketed_batches, item_seed

__all__ = ["CachedStates", "DllmAsrDataModule", "Recordings"]

BUCKET = 25  # states; utterances whose lengths differ by less share batches at random
BATCH_SIZE = 8  # of validation


class CachedStates(Dataset[Utterance]):
    """Utterances of shards, read from disk when asked for by `(epoch, index)`.

    Args:
        shards: files written by `features.py`; `.drafts.json` beside one, by `drafts.py`, holds what the CTC head
            writes.
        limit: use only the first so many utterances.
        seed: of what training draws for each.

    Raises:
        ValueError: a `.drafts.json` is of another number of utterances.
    """

    def __init__(self, shards: Sequence[Path], limit: int | None = None, seed: int = 0) -> None:
        self.seed = seed
        self.files: list[Any] = [safe_open(path, "pt") for path in shards]
        self.rows: list[tuple[int, int, int, str]] = []
        self.drafts: list[list[tuple[str, float, float, float]]] = []
        for i, file in enumerate(self.files):
            offset = file.get_tensor("offset").tolist()
            texts = json.loads(file.metadata()["texts"])
            self.rows += [(i, a, b, text) for a, b, text in zip(offset, offset[1:], texts, strict=False)]
            drafts = shards[i].with_suffix(".drafts.json")
            written = json.loads(drafts.read_text()) if drafts.exists() else [[] for _ in texts]
            if len(written) != len(texts):
                raise ValueError(f"{drafts} has drafts of {len(written)} utterances, its shard has {len(texts)}")
            self.drafts += written
        self.rows = self.rows[:limit]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Utterance:
        epoch, index = key
        file, start, stop, text = self.rows[index]
        draft = [DraftWord(*word) for word in self.drafts[index]]
        states = self.files[file].get_slice("states")[start:stop]
        return Utterance(states, text, draft, item_seed(self.seed, epoch, index))

    @property
    def lengths(self) -> list[int]:
        """States of each utterance."""
        return [b - a for _, a, b, _ in self.rows]


class Recordings(Dataset[Recording]):
    """Real recordings, read from disk when asked for by `(epoch, index)`.

    Args:
        folder: with a `manifest.jsonl` of `audio_filepath` (relative to the folder) and `text`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> Recording:
        row = self.rows[key[1]]
        return Recording(read_audio(self.folder / row["audio_filepath"]), row["text"])


class DllmAsrDataModule(ResumableDataModule):
    """Training shards, synthetic development shards, and real development recordings.

    A training batch is a `Batch`: `states` (B, N, hidden_size), zero after each utterance; `lengths` (B,); `texts`;
    `drafts`, the CTC head's words; `seeds`. A batch of development shards is the same, one of real recordings is an
    `AudioBatch` of `audio` and `texts`, which the module encodes.

    Args:
        features: folder of cached shards; files named `dev-*` are for development.
        dev_recordings: folder with a `manifest.jsonl` of real recordings.
        max_states: most encoder states of a training batch of one process, padding included.
        dev_utterances: most synthetic utterances to validate on.
        seed: of the order of the batches, and of what training draws for an utterance.
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
        self.train = CachedStates(train, seed=h.seed)
        # A spread over all voices, not the first shards only.
        random.Random(h.seed).shuffle(dev)
        self.dev = CachedStates(dev, h.dev_utterances) if dev else None
        self.recordings = Recordings(Path(h.dev_recordings)) if h.dev_recordings else None

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training utterances."""
        h: Any = self.hparams
        sampler = bucketed_batches(self.train.lengths, h.max_states, seed=h.seed, bucket=BUCKET)
        return self.training_loader(self.train, sampler, collate)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Synthetic development utterances, then real ones."""
        loaders = []
        if self.dev is not None:
            loaders.append(self.evaluation_loader(self.dev, BATCH_SIZE, collate))
        if self.recordings is not None:
            loaders.append(self.evaluation_loader(self.recordings, BATCH_SIZE, collate_audio))
        return loaders
