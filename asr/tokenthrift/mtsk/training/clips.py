"""Clips, batches of them, and their two sources: manifests, and shards of encoder states.

A manifest has a JSON object a line: `audio_filepath`, `video_filepath` (either may be absent; paths are relative to the
manifest), `text` and `duration` in seconds. Video is talking-face video or mouth crops (see `audiovisual.lips`), audio
anything that can be decoded; the two streams keep their own lengths. States are shards of safetensors: `audio` and
`video` (states of all items end to end), `audio_offset` and `video_offset`, in the metadata the texts and, where it is
known, `trailing_silence`, what Whisper read after each recording. With frozen encoders they save nearly all of the
work.

Source: Llama-MTSK (arXiv 2503.06362). What differs: the augmentation of a clip depends on its epoch and its index in
the manifest alone, so that it is the same on any number of processes and after a resume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from tokenthrift.media.audio import AudioError, read_audio
from tokenthrift.media.video import VideoError
from tokenthrift.mtsk.audiovisual.lips import FaceError, read_lips
from tokenthrift.mtsk.planning import FRAMES_PER_SECOND, SAMPLE_RATE
from tokenthrift.mtsk.training.augmentation import Augmentation
from tokenthrift.padding import pad_rows
from tokenthrift.training.sampler import Key, item_rng
from tokenthrift.whisper import MAX_STATES, states_of

__all__ = ["UNREADABLE", "Batch", "CachedStates", "Clip", "ManifestClips", "collate", "open_clips", "open_passes"]

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
    """Items of one batch, in the order of `texts`: B texts, and for each stream either B recordings or padded states.

    A batch of which no file could be read has no texts and no streams.

    Attributes:
        texts: what is said.
        audio: recordings, as in `LlamaMtsk.encode`, or padded states (B, N, D).
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
    """One batch; a stream that is missing in any item is missing in the batch. No clips make an empty batch.

    Raises:
        ValueError: no stream is in all items.
    """
    batch = Batch([clip.text for clip in clips])
    if not clips:
        return batch
    for name in ("audio", "video"):
        rows: Any = [getattr(clip, name) for clip in clips]
        if any(row is None for row in rows):
            continue
        if rows[0].ndim == 2:
            setattr(batch, f"{name}_lengths", torch.tensor([len(row) for row in rows]))
            rows = pad_rows([row.float() for row in rows])[0]
        setattr(batch, name, rows)
    if batch.audio is None and batch.video is None:
        counts = [sum(getattr(clip, name) is not None for clip in clips) for name in ("audio", "video")]
        raise ValueError(
            f"of {len(clips)} items of a batch {counts[0]} have audio and {counts[1]} have video, so no stream is in"
            " all; keep clips of audio alone and of video alone in different manifests"
        )
    return batch


class ManifestClips(Dataset[Clip]):
    """The clips of a manifest; each is read and augmented when it is indexed.

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
        """One clip; the key of a training item is its epoch and index, which seed its augmentation."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row, rng = self.rows[index], item_rng(self.seed, epoch, index)
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
        return [max(1, round(row["duration"] * FRAMES_PER_SECOND)) for row in self.rows]


class CachedStates(Dataset[Clip]):
    """Encoder states of shards; those of an item are read when it is indexed.

    Args:
        shards: files as described above.

    Attributes:
        trailing_silence: seconds that Whisper read after each recording; None where no shard says it.

    Raises:
        ValueError: shards say different things of it.
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
        said = {float(value) for file in self.files if (value := file.metadata().get("trailing_silence")) is not None}
        if len(said) > 1:
            raise ValueError(f"shards of states were made with different trailing_silence: {sorted(said)}")
        self.trailing_silence = said.pop() if said else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | Key) -> Clip:
        """The states of one item; no random number is used, so the epoch does not matter."""
        index = key[1] if isinstance(key, tuple) else key
        file, spans = self.rows[index]
        states = {name: self.files[file].get_slice(name)[a:b] for name, (a, b) in spans.items()}
        return Clip(self.texts[index], **states)

    @property
    def frames(self) -> list[int]:
        """The length of every item in frames of 25 a second."""
        out = []
        for _, spans in self.rows:
            (a, b), (c, d) = spans.get("audio", (0, 0)), spans.get("video", (0, 0))
            out.append(max(1, -(-(b - a) // 2), d - c))
        return out


def open_clips(source: str, augmentation: Augmentation | None, crop: int, seed: int) -> ManifestClips | CachedStates:
    """A manifest, or a folder of shards of states.

    Raises:
        FileNotFoundError: a folder without shards.
    """
    path = Path(source)
    if not path.is_dir():
        return ManifestClips(path, augmentation, crop, seed)
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no shards of states (*.safetensors) in {path}; recipes/mtsk/states.py makes them")
    return CachedStates(shards)


def open_passes(folder: str | Path) -> tuple[CachedStates, CachedStates, CachedStates]:
    """All passes over the training recordings, the clean one alone, and development, as `speech_states.py` writes them.

    Args:
        folder: has `train` and `dev`; a shard `NN-*.safetensors` is of pass NN, and pass 00 is clean.

    Raises:
        FileNotFoundError: one of the three has no shards.
        ValueError: the passes are over different recordings, as when one but the last was stopped before its end.
    """
    found = []
    for pattern in ("train/*.safetensors", "train/00-*.safetensors", "dev/*.safetensors"):
        if not (shards := sorted(Path(folder).glob(pattern))):
            raise FileNotFoundError(f"no states of {Path(folder, pattern)}; recipes/mtsk/speech_states.py makes them")
        found.append(CachedStates(shards))
    train, clean, dev = found
    if any(text != clean.texts[i % len(clean)] for i, text in enumerate(train.texts)):
        raise ValueError(f"{Path(folder, 'train')} has passes over different recordings")
    return train, clean, dev
