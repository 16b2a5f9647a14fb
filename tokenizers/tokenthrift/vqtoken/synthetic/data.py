"""Synthetic clips with questions as training and test data, drawn as they are needed.

Every clip is a function of a seed and its number, so there is nothing to store, no clip comes twice in a run, and a run
that is resumed goes on with the clip after the last. Parts differ in seeds and in the clips that serve as backgrounds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.vqtoken.synthetic.questions import Question, Scene, ask, make_scene, names, encode_text
from tokenthrift.vqtoken.synthetic.scenes import Pixels, draw, patch_labels, read_backgrounds, texture, window

__all__ = ["Clip", "ClipBatch", "SyntheticClips", "VQTokenDataModule", "collate", "encoded"]

_LENGTH: Final = 13  # words of the longest question
_PARTS: Final = {"train": 0, "dev": 1, "test": 2}


class Clip(NamedTuple):
    """One clip: (T, side, side, 3) pixels, its scene, and questions."""

    frames: Pixels
    scene: Scene
    questions: list[Question]


@dataclass(slots=True)
class ClipBatch:
    """Clips side by side.

    Attributes:
        frames: (B, T, 3, side, side) uint8.
        questions: (B, Q, L) int64 words, 0 after the end.
        answers: (B, Q) int64 words.
        labels: (B, T, h, w, 3) int64 color, shape and thing of every patch, see `patch_labels`.
        names: (B, 6, 5) int64 words of every thing, see `names`; zeros first, for no thing.
        asked: the questions as text.
        seed: of whatever is random about the batch.
    """

    frames: Tensor
    questions: Tensor
    answers: Tensor
    labels: Tensor
    names: Tensor
    asked: list[list[Question]]
    seed: int

    def to(self, device: torch.device | str) -> ClipBatch:
        """The batch on another device."""
        frames, questions, answers, labels, names = (
            tensor.to(device) for tensor in (self.frames, self.questions, self.answers, self.labels, self.names)
        )
        return ClipBatch(frames, questions, answers, labels, names, self.asked, self.seed)


class SyntheticClips(Dataset[Clip]):
    """Clips made on demand; the same number gives the same clip, whatever was asked for before.

    Args:
        part: "train", "dev" or "test"; each has seeds of its own.
        count: how many there are.
        backgrounds: clips to draw on; none draws on texture.
        seed: of the whole set.
        textures: share of clips drawn on texture although there are backgrounds.
        questions: about each clip.
        frames, side: of each clip.
    """

    def __init__(
        self,
        part: str,
        count: int,
        backgrounds: Sequence[Pixels] = (),
        *,
        seed: int = 0,
        textures: float = 0.0,
        questions: int = 8,
        frames: int = 8,
        side: int = 64,
    ) -> None:
        self.part, self.count, self.backgrounds, self.seed = part, count, backgrounds, seed
        self.textures, self.questions, self.frames, self.side = textures, questions, frames, side

    def __len__(self) -> int:
        return self.count

    def questions_of(self, index: int) -> list[Question]:
        """The questions of a clip, without drawing it."""
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[Scene, list[Question], random.Random]:
        """What happens, what is asked, and the numbers that the background is drawn with."""
        rng = random.Random((self.seed * len(_PARTS) + _PARTS[self.part]) * 2**40 + index)
        while True:
            scene = make_scene(rng, self.frames, self.side)
            try:
                return scene, ask(scene, rng, self.questions), rng
            except ValueError:  # a scene of few things, all doing the same, has few questions
                continue

    def __getitem__(self, index: int) -> Clip:
        scene, questions, rng = self._scene(index)
        if self.backgrounds and rng.random() >= self.textures:
            background = window(self.backgrounds, rng, self.frames, self.side)
        else:
            background = texture(rng, self.frames, self.side)
        return Clip(draw(scene, background), scene, questions)


def encoded(questions: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor]:
    """(B, Q, L) words of questions and (B, Q) of their answers."""
    rows = [[encode_text(q.text) for q in asked] for asked in questions]
    ids = [[words + [0] * (_LENGTH - len(words)) for words in row] for row in rows]
    return torch.tensor(ids), torch.tensor([[encode_text(q.answer)[0] for q in asked] for asked in questions])


def collate(clips: Sequence[Clip], patch: int) -> ClipBatch:
    """Puts clips side by side.

    Args:
        clips: of one size and one number of questions.
        patch: pixels of a side of the patches that are labelled.
    """
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3).contiguous()
    labels = torch.from_numpy(np.stack([patch_labels(clip.scene, patch) for clip in clips]))
    asked = [clip.questions for clip in clips]
    seed = random.Random(repr(asked)).getrandbits(31)
    words = torch.zeros(len(clips), 6, 5, dtype=torch.long)
    for row, clip in zip(words, clips, strict=True):
        row[1 : 1 + len(clip.scene.things)] = torch.tensor(names(clip.scene))
    return ClipBatch(frames, *encoded(asked), labels, words, asked, seed)


class Onward(DistributedSampler[int]):
    """An endless row of numbers, `count` of them an epoch, dealt out to processes in turns.

    A DistributedSampler, since Lightning would put one of its own around any other, which knows no resuming.

    Args:
        done: how many numbers this process has had before.
        count: numbers of an epoch, of all processes together.
        rank: of this process.
        world: how many processes there are.
    """

    def __init__(self, done: int, count: int, rank: int = 0, world: int = 1) -> None:
        super().__init__(cast(Dataset[int], range(count)), num_replicas=world, rank=rank, shuffle=False)
        self.done = done

    def __iter__(self) -> Iterator[int]:
        # Lightning asks once an epoch; after a resume in the middle of one, the first is shorter.
        stop = (self.done // self.num_samples + 1) * self.num_samples
        first, self.done = self.done, stop
        yield from range(first * self.num_replicas + self.rank, stop * self.num_replicas, self.num_replicas)


class VQTokenDataModule(ResumableDataModule):
    """Synthetic clips with questions, over real backgrounds where a folder of them is given.

    Args:
        backgrounds: folder with `train`, `dev` and `test`, as recipes/vqtoken/backgrounds.py writes it; none draws all
            clips on texture.
        clips: training clips of an epoch; the next epoch has others.
        dev_clips: to validate on.
        test_clips: to test on.
        batch_size: clips of a batch.
        questions: about each clip.
        textures: share of training clips drawn on texture although there are backgrounds.
        frames: of a clip.
        side: pixels of a side of a frame.
        patch: pixels of a side of a patch of the encoder.
        seed: of all clips.
    """

    def __init__(
        self,
        backgrounds: str | None = None,
        clips: int = 16_000,
        dev_clips: int = 256,
        test_clips: int = 500,
        batch_size: int = 16,
        questions: int = 8,
        textures: float = 0.25,
        frames: int = 8,
        side: int = 64,
        patch: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if clips % batch_size:
            raise ValueError(f"clips ({clips}) must be a multiple of batch_size ({batch_size})")
        self.save_hyperparameters()

    def clips(self, part: str, count: int) -> SyntheticClips:
        """Clips of a part.

        Raises:
            FileNotFoundError: the folder has no backgrounds for it.
        """
        h: Any = self.hparams
        scenery = [] if h.backgrounds is None else read_backgrounds(Path(h.backgrounds) / part)
        share = h.textures if part == "train" else 0.0
        return SyntheticClips(
            part,
            count,
            scenery,
            seed=h.seed,
            textures=share,
            questions=h.questions,
            frames=h.frames,
            side=h.side,
        )

    def setup(self, stage: str) -> None:
        """Opens the backgrounds."""
        h: Any = self.hparams
        self.train = self.clips("train", 2**31)
        self.dev, self.test = self.clips("dev", h.dev_clips), self.clips("test", h.test_clips)

    def train_dataloader(self) -> DataLoader[Clip]:
        """The clips after the last.

        Raises:
            ValueError: the batches of an epoch cannot be shared out evenly.
        """
        h: Any = self.hparams
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if h.clips % (h.batch_size * world):
            raise ValueError(f"clips ({h.clips}) must be a multiple of batch_size ({h.batch_size}) x {world} processes")
        return self._loader(self.train, Onward(self.consumed * h.batch_size, h.clips, rank, world))

    def val_dataloader(self) -> DataLoader[Clip]:
        """The same clips every time."""
        return self._loader(self.dev)

    def test_dataloader(self) -> DataLoader[Clip]:
        """Clips over backgrounds that neither training nor development saw."""
        return self._loader(self.test)

    def _loader(self, clips: SyntheticClips, sampler: Onward | None = None) -> DataLoader[Clip]:
        h: Any = self.hparams
        return DataLoader(clips, h.batch_size, sampler=sampler, collate_fn=partial(collate, patch=h.patch))
