"""Synthetic clips with questions as training and test data, drawn as they are needed.

Made for this project. Every clip is a function of a seed and its number, so nothing is stored. A training epoch has
clips of its own: item i of epoch e is clip e * n + i, where n is the number of clips of an epoch. Parts differ in seeds
and in the clips that serve as backgrounds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import Key, item_seed, random_batches
from tokenthrift.vqtoken.synthetic.questions import (
    Question,
    Scene,
    encode_text,
    make_questions,
    make_scene,
    shape_words,
)
from tokenthrift.vqtoken.synthetic.scenes import Pixels, draw, patch_labels, read_backgrounds, texture, window

__all__ = ["Clip", "ClipBatch", "SyntheticClips", "VQTokenDataModule", "collate", "encode_questions"]

_LENGTH: Final = 13  # words of the longest question
_MOST_SHAPES: Final = 5
_WORDS_OF_A_SHAPE: Final = 5
_PARTS: Final = {"train": 0, "dev": 1, "test": 2}


class Clip(NamedTuple):
    """One clip: (T, image_size, image_size, 3) pixels, its scene, its questions, and a seed for what is drawn of it."""

    frames: Pixels
    scene: Scene
    questions: list[Question]
    seed: int


@dataclass(slots=True)
class ClipBatch:
    """B clips of T frames with Q questions each.

    Attributes:
        frames: (B, T, 3, image_size, image_size) uint8.
        question_ids: (B, Q, L) int64 token ids, 0 after the end.
        answer_ids: (B, Q) int64 token ids.
        patch_labels: (B, T, h, w, 3) int64 color, name and shape that every patch shows, see `scenes.patch_labels`.
        shape_words: (B, 6, 5) int64 words of every shape, see `questions.shape_words`; row 0 is zero, for no shape.
        questions: the questions as text.
        seeds: B seeds, of what is drawn for each clip in training.
    """

    frames: Tensor
    question_ids: Tensor
    answer_ids: Tensor
    patch_labels: Tensor
    shape_words: Tensor
    questions: list[list[Question]]
    seeds: list[int]

    def to(self, device: torch.device | str) -> ClipBatch:
        """The batch on another device."""
        return replace(
            self,
            frames=self.frames.to(device),
            question_ids=self.question_ids.to(device),
            answer_ids=self.answer_ids.to(device),
            patch_labels=self.patch_labels.to(device),
            shape_words=self.shape_words.to(device),
        )


class SyntheticClips(Dataset[Clip]):
    """Clips made on demand, by their number or by `(epoch, index)`; the same number always gives the same clip.

    Args:
        part: "train", "dev" or "test"; each has seeds of its own.
        count: clips of an epoch.
        backgrounds: clips to draw on; with none, clips are drawn on texture.
        seed: of the whole set.
        texture_share: share of clips drawn on texture although there are backgrounds.
        questions_per_clip: about each clip.
        num_frames: of each clip.
        image_size: pixels along a side of a frame.
    """

    def __init__(
        self,
        part: str,
        count: int,
        backgrounds: Sequence[Pixels] = (),
        *,
        seed: int = 0,
        texture_share: float = 0.0,
        questions_per_clip: int = 8,
        num_frames: int = 8,
        image_size: int = 64,
    ) -> None:
        self.part, self.count, self.backgrounds, self.seed = part, count, backgrounds, seed
        self.texture_share, self.questions_per_clip = texture_share, questions_per_clip
        self.num_frames, self.image_size = num_frames, image_size

    def __len__(self) -> int:
        return self.count

    def questions_of(self, number: int) -> list[Question]:
        """The questions of a clip, without drawing it."""
        return self._scene(number)[1]

    def _scene(self, number: int) -> tuple[Scene, list[Question], random.Random]:
        """A scene, its questions, and the generator that draws its background."""
        rng = random.Random((self.seed * len(_PARTS) + _PARTS[self.part]) * 2**40 + number)
        while True:
            scene = make_scene(rng, self.num_frames, self.image_size)
            try:
                return scene, make_questions(scene, rng, self.questions_per_clip), rng
            except ValueError:  # a scene of few shapes that all do the same has few questions
                continue

    def __getitem__(self, key: int | Key) -> Clip:
        epoch, index = (0, key) if isinstance(key, int) else key
        scene, questions, rng = self._scene(epoch * self.count + index)
        if self.backgrounds and rng.random() >= self.texture_share:
            background = window(self.backgrounds, rng, self.num_frames, self.image_size)
        else:
            background = texture(rng, self.num_frames, self.image_size)
        return Clip(draw(scene, background), scene, questions, item_seed(self.seed, epoch, index))


def encode_questions(questions: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor]:
    """(B, Q, L) token ids of questions, and (B, Q) of their answers."""
    rows = [[encode_text(question.text) for question in row] for row in questions]
    ids = [[words + [0] * (_LENGTH - len(words)) for words in row] for row in rows]
    answers = [[encode_text(question.answer)[0] for question in row] for row in questions]
    return torch.tensor(ids), torch.tensor(answers)


def collate(clips: Sequence[Clip], patch_size: int) -> ClipBatch:
    """Makes a batch of clips.

    Args:
        clips: of one size and one number of questions.
        patch_size: pixels along a side of the patches that are labeled.
    """
    frames = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3).contiguous()
    labels = torch.from_numpy(np.stack([patch_labels(clip.scene, patch_size) for clip in clips]))
    words = torch.zeros(len(clips), 1 + _MOST_SHAPES, _WORDS_OF_A_SHAPE, dtype=torch.long)
    for row, clip in zip(words, clips, strict=True):
        row[1 : 1 + len(clip.scene.shapes)] = torch.tensor(shape_words(clip.scene))
    questions = [clip.questions for clip in clips]
    return ClipBatch(frames, *encode_questions(questions), labels, words, questions, [clip.seed for clip in clips])


class VQTokenDataModule(ResumableDataModule):
    """Synthetic clips with questions, over real backgrounds where a folder of them is given.

    Every batch is a `ClipBatch`: frames, questions and answers as token ids, and what every patch shows. Processes
    share the clips of an epoch, and a resumed run goes on with the clips that would have come.

    Args:
        backgrounds: folder with `train`, `dev` and `test`, as recipes/vqtoken/backgrounds.py writes it; without one,
            all clips are drawn on texture.
        train_clips: training clips of an epoch; the next epoch has others.
        dev_clips: clips to validate on.
        test_clips: clips to test on.
        batch_size: clips of a batch on each device.
        questions_per_clip: about each clip.
        texture_share: share of training clips drawn on texture although there are backgrounds.
        num_frames: frames of a clip.
        image_size: pixels along a side of a frame.
        patch_size: pixels along a side of a patch of the encoder.
        seed: of all clips.
    """

    def __init__(
        self,
        backgrounds: str | None = None,
        train_clips: int = 16_000,
        dev_clips: int = 256,
        test_clips: int = 500,
        batch_size: int = 16,
        questions_per_clip: int = 8,
        texture_share: float = 0.25,
        num_frames: int = 8,
        image_size: int = 64,
        patch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def clips(self, part: str, count: int) -> SyntheticClips:
        """Clips of a part.

        Raises:
            FileNotFoundError: the folder has no backgrounds for it.
        """
        h: Any = self.hparams
        return SyntheticClips(
            part,
            count,
            [] if h.backgrounds is None else read_backgrounds(Path(h.backgrounds) / part),
            seed=h.seed,
            texture_share=h.texture_share if part == "train" else 0.0,
            questions_per_clip=h.questions_per_clip,
            num_frames=h.num_frames,
            image_size=h.image_size,
        )

    def setup(self, stage: str) -> None:
        """Opens the backgrounds."""
        h: Any = self.hparams
        self.train = self.clips("train", h.train_clips)
        self.dev, self.test = self.clips("dev", h.dev_clips), self.clips("test", h.test_clips)

    def train_dataloader(self) -> DataLoader[Any]:
        """Clips of every epoch in random order, from where this run begins."""
        h: Any = self.hparams
        sampler = random_batches(range(h.train_clips), h.batch_size, seed=h.seed)
        return self.training_loader(self.train, sampler, self._collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same clips every time."""
        return self.evaluation_loader(self.dev, self.hparams["batch_size"], self._collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Clips over backgrounds that neither training nor development saw."""
        return self.evaluation_loader(self.test, self.hparams["batch_size"], self._collate)

    @property
    def _collate(self) -> Any:
        return partial(collate, patch_size=self.hparams["patch_size"])
