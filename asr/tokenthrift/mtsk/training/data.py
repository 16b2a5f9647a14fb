"""Training data of Llama-MTSK: manifests of audio-visual clips, or encoder states made of them once.

A manifest has a JSON object a line: `audio_filepath`, `video_filepath` (either may be absent; paths are relative to the
manifest), `text` and `duration` in seconds. Video is talking-face video or mouth crops (see `lips`), audio anything
that can be decoded; the two streams keep their own lengths. States are shards of safetensors: `audio` and `video`
(states of all items end to end), `audio_offset` and `video_offset`, and the texts in the metadata; with frozen encoders
they save nearly all of the work.

Source: Llama-MTSK (arXiv 2503.06362) for the batches: lengths in frames of 25 a second, 400 linear bins, sorted by bin
then length, filled up to a number of frames, batches in a drawn order. What differs: development clips are never test
clips (one in fifty of the training texts where no development set is named; the published code validates on the test
set), the order is seeded, and a resumed run goes on with the batch and the augmentation that would have come.
"""

from __future__ import annotations

import json
import random
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenthrift.media.audio import AudioError, read_audio
from tokenthrift.media.video import VideoError
from tokenthrift.mtsk.augmentation import Augmentation
from tokenthrift.mtsk.avhubert import FRAME_RATE
from tokenthrift.mtsk.lips import FaceError, read_lips
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.whisper import MAX_STATES, SAMPLE_RATE, states_of

__all__ = [
    "UNREADABLE",
    "Batch",
    "BucketBatches",
    "CachedStates",
    "Clip",
    "ManifestClips",
    "MtskDataModule",
    "collate",
    "held_out",
]

Key = tuple[int, int]
"""Epoch and index of a training item."""
UNREADABLE = (AudioError, VideoError, FaceError)
"""What is wrong with a clip's files, not with the program; each names the file."""


@dataclass(slots=True)
class Clip:
    """One item: sound and pictures, or their encoder states.

    Attributes:
        text: what is said.
        audio: (samples,) at 16 kHz, or (N, D) states.
        video: (T, H, W) uint8 mouth crops, or (T, D) states.
    """

    text: str
    audio: Tensor | None = None
    video: Tensor | None = None


@dataclass(slots=True)
class Batch:
    """Items of one batch, in the order of `texts`.

    Attributes:
        texts: what is said.
        audio: recordings, as in `LlamaMTSK.encode`, or padded states (B, N, D).
        video: mouth crops, or padded states (B, T, D).
        audio_lengths: (B,) states of each item where `audio` are states.
        video_lengths: (B,) states of each item where `video` are states.
    """

    texts: list[str]
    audio: list[Tensor] | Tensor | None = None
    video: list[Tensor] | Tensor | None = None
    audio_lengths: Tensor | None = None
    video_lengths: Tensor | None = None


def collate(clips: Sequence[Clip]) -> Batch:
    """One batch; a stream that is missing in any item is missing in the batch.

    Raises:
        ValueError: no stream is in all items.
    """
    batch = Batch([clip.text for clip in clips])
    for name, state_axes in (("audio", 2), ("video", 2)):
        rows = [getattr(clip, name) for clip in clips]
        if any(row is None for row in rows):
            continue
        if rows[0].ndim == state_axes:
            setattr(batch, f"{name}_lengths", torch.tensor([len(row) for row in rows]))
            rows = pad_sequence([row.float() for row in rows], batch_first=True)  # type: ignore[assignment]
        setattr(batch, name, rows)
    if batch.audio is None and batch.video is None:
        counts = [sum(getattr(clip, name) is not None for clip in clips) for name in ("audio", "video")]
        raise ValueError(
            f"of {len(clips)} items of a batch {counts[0]} have audio and {counts[1]} have video, so no stream is in"
            " all; keep clips of audio alone and of video alone in different manifests"
        )
    return batch


class ManifestClips(Dataset[Clip]):
    """The clips of a manifest, read and augmented when asked for.

    Args:
        manifest: the JSON lines file.
        augmentation: of training clips; none for development and test.
        crop: side of the mouth crop that training augments to.
        seed: of the augmentation.

    Raises:
        ValueError: a line is not what it should be; the message names it.
    """

    def __init__(
        self,
        manifest: str | Path,
        augmentation: Augmentation | None = None,
        crop: int = 88,
        seed: int = 0,
    ) -> None:
        self.folder, self.augmentation, self.crop, self.seed = Path(manifest).parent, augmentation, crop, seed
        self.rows: list[dict[str, Any]] = []
        for number, line in enumerate(Path(manifest).read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            where = f"{manifest}, line {number}"
            if not isinstance(row.get("text"), str) or not isinstance(row.get("duration"), int | float):
                raise ValueError(f"{where}: an item needs a text and a duration in seconds")
            if not (row.get("audio_filepath") or row.get("video_filepath")):
                raise ValueError(f"{where}: an item needs audio_filepath or video_filepath")
            self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | Key) -> Clip:
        """One clip; a training item is asked for by epoch and index, which seed its augmentation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row, rng = self.rows[index], random.Random(f"{self.seed}-{epoch}-{index}")
        audio = None
        if row.get("audio_filepath"):
            path = self.folder / row["audio_filepath"]
            audio = read_audio(path)
            if states_of(len(audio)) > MAX_STATES:
                raise AudioError(path, f"{len(audio) / SAMPLE_RATE:.1f} s are more than one pass of 30 s; cut it up")
        video = read_lips(self.folder / row["video_filepath"]).pixels if row.get("video_filepath") else None
        if self.augmentation is not None:
            audio = None if audio is None else self.augmentation.audio(audio, rng)
            video = None if video is None else self.augmentation.video(video, rng, self.crop)
        return Clip(row["text"], audio, video)

    @property
    def texts(self) -> list[str]:
        """The text of every item."""
        return [row["text"] for row in self.rows]

    @property
    def frames(self) -> list[int]:
        """The length of every item in frames of 25 a second."""
        return [max(1, round(row["duration"] * FRAME_RATE)) for row in self.rows]


class CachedStates(Dataset[Clip]):
    """Encoder states of shards; those of an item are read when asked for.

    Args:
        shards: files as described above.
    """

    def __init__(self, shards: Sequence[str | Path]) -> None:
        self.files: list[Any] = []
        self.texts: list[str] = []
        self.rows: list[tuple[int, dict[str, tuple[int, int]]]] = []
        for path in shards:
            file = safe_open(path, "pt")
            texts: list[str] = json.loads(file.metadata()["texts"])
            names = [name for name in ("audio", "video") if f"{name}_offset" in set(file.keys())]
            offsets = {name: file.get_tensor(f"{name}_offset").tolist() for name in names}
            for i in range(len(texts)):
                self.rows.append((len(self.files), {name: (o[i], o[i + 1]) for name, o in offsets.items()}))
            self.files.append(file)
            self.texts += texts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | Key) -> Clip:
        """The states of one item; nothing is drawn, so the epoch has no say."""
        index = key[1] if isinstance(key, tuple) else key
        file, places = self.rows[index]
        states = {name: self.files[file].get_slice(name)[a:b] for name, (a, b) in places.items()}
        return Clip(self.texts[index], **states)

    @property
    def frames(self) -> list[int]:
        """The length of every item in frames of 25 a second."""
        out = []
        for _, places in self.rows:
            (a, b), (c, d) = places.get("audio", (0, 0)), places.get("video", (0, 0))
            out.append(max(1, -(-(b - a) // 2), d - c))
        return out


class BucketBatches(Sampler[list[Key]]):
    """Batches of items of like length, in a new seeded order each epoch.

    Args:
        frames: length of each item.
        max_frames: most frames of a batch, the sum of its items; a longer item has a batch to itself.
        seed: of the order.
        buckets: linear bins of length.
    """

    def __init__(self, frames: Sequence[int], max_frames: int, seed: int = 0, buckets: int = 400) -> None:
        self.seed, self.epoch, self.skip = seed, 0, 0
        low, high = min(frames), max(frames)
        width = max(1e-9, (high - low) / buckets)
        order = sorted(range(len(frames)), key=lambda i: (int((frames[i] - low) / width), frames[i], i))
        self.batches: list[list[int]] = []
        total = 0
        for i in order:
            if not self.batches or total + frames[i] > max_frames:
                self.batches.append([])
                total = 0
            self.batches[-1].append(i)
            total += frames[i]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(len(self.batches)))
        random.Random(f"{self.seed}-{self.epoch}").shuffle(order)
        epoch, skip = self.epoch, self.skip
        self.epoch, self.skip = epoch + 1, 0
        for place in order[skip:]:
            yield [(epoch, index) for index in self.batches[place]]


def held_out(texts: Sequence[str], share: float) -> tuple[list[int], list[int]]:
    """Places of training and of development items: equal texts go to the same side, by their checksum.

    Args:
        texts: of all items.
        share: of the development items.
    """
    chosen = [zlib.crc32(text.encode()) < share * 2**32 for text in texts]
    return [i for i, dev in enumerate(chosen) if not dev], [i for i, dev in enumerate(chosen) if dev]


class _Part(Dataset[Clip]):
    """Some items of a data set; those that cannot be read are left out of their batches."""

    def __init__(self, whole: ManifestClips | CachedStates, places: Sequence[int]) -> None:
        self.whole, self.places = whole, places
        self.broken: set[int] = set()
        frames = whole.frames
        self.frames = [frames[i] for i in places]
        self.texts = [whole.texts[i] for i in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: int | Key) -> Clip:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self.whole[epoch, self.places[index]]

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


def _collate(clips: Sequence[Clip]) -> Batch | None:
    """As `collate`; None where nothing of a batch could be read, which Lightning skips."""
    return collate(clips) if clips else None


class MtskDataModule(ResumableDataModule):
    """Training and development clips. A clip whose files cannot be read is named in a warning, counted and left out.

    Args:
        train: a manifest, or a folder of shards of states.
        dev: the same for development; one in fifty of the training texts if not given. Never the test set.
        noise: folders of noise for clips of a manifest; files named `rir*` are impulse responses of rooms.
        max_frames: most frames (25 a second) of a training batch.
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
        whole = _open(h.train, augmentation, h.crop, h.seed)
        if h.dev is None:
            places, others = held_out(whole.texts, 0.02)
            plain = _open(h.train, None, h.crop, h.seed)
            self.train, self.dev = _Part(whole, places), _Part(plain, others[: h.dev_items])
        else:
            plain = _open(h.dev, None, h.crop, h.seed)
            self.train = _Part(whole, range(len(whole)))
            self.dev = _Part(plain, random.Random(h.seed).sample(range(len(plain)), min(h.dev_items, len(plain))))
        self.order = BucketBatches(self.train.frames, h.max_frames, h.seed)

    def train_dataloader(self) -> DataLoader[Clip]:
        """Augmented batches within the budget of frames."""
        self.order.epoch, self.order.skip = divmod(self.consumed, len(self.order))
        return DataLoader(self.train, batch_sampler=self.order, collate_fn=_collate)

    def val_dataloader(self) -> DataLoader[Clip]:
        """Development clips as they are."""
        return DataLoader(self.dev, batch_size=16, collate_fn=_collate)


def _open(source: str, augmentation: Augmentation | None, crop: int, seed: int) -> ManifestClips | CachedStates:
    path = Path(source)
    if not path.is_dir():
        return ManifestClips(path, augmentation, crop, seed)
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no shards of states (*.safetensors) in {path}; recipes/mtsk/states.py makes them")
    return CachedStates(shards)
