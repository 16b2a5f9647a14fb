"""Videos with conversations as training data for LLaVA-OneVision: a manifest, read as it is needed.

Source: the published recipe of VQToken (arXiv 2503.16980; finetune_ov_all.sh): up to 32 frames spread over the clip,
one placeholder for the video in the first turn of a ChatML conversation, loss on the answers only. Differs: a manifest
of one JSON object a line, `{"video": "a.mp4", "turns": [{"question": "...", "answer": "..."}]}`, with paths relative to
it; a video that cannot be read, or whose first answer is cut off, is skipped for the next and named, instead of ending
the run; the order depends on seed and epoch alone, and a resumed run goes on with the item after the last.
"""

from __future__ import annotations

import json
import logging
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenthrift.media.video import VideoError, read_frames
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.vqtoken.synthetic.data import Onward

__all__ = [
    "Conversation",
    "ConversationBatch",
    "Conversations",
    "VideoConversationsDataModule",
    "encode",
    "read_manifest",
]

_LOG = logging.getLogger(__name__)
_IGNORED: Final = -100
_SYSTEM: Final = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Conversation:
    """A video file and what is asked and answered about it."""

    video: Path
    turns: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class ConversationBatch:
    """One conversation, ready for the model.

    Attributes:
        inputs: what the model takes: `input_ids`, `attention_mask`, `pixel_values_videos`.
        labels: (1, L) int64, -100 everywhere but in answers.
    """

    inputs: dict[str, Tensor]
    labels: Tensor

    def to(self, device: torch.device | str) -> ConversationBatch:
        """The batch on another device."""
        return ConversationBatch({name: t.to(device) for name, t in self.inputs.items()}, self.labels.to(device))


def read_manifest(path: str | Path) -> list[Conversation]:
    """Conversations of a manifest.

    Raises:
        ValueError: a line is not such an object; the message gives its number.
        OSError: the file cannot be read.
    """
    path, out = Path(path), []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                turns = tuple((str(turn["question"]), str(turn["answer"])) for turn in row["turns"])
                out.append(Conversation(path.parent / row["video"], turns))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected video and turns of question and answer: {error}"
                ) from None
            if not turns:
                raise ValueError(f"{path}, line {number}: a conversation needs at least one turn")
    if not out:
        raise ValueError(f"{path} holds no conversations")
    return out


def encode(processor: Any, pixels: Tensor, turns: tuple[tuple[str, str], ...], longest: int) -> ConversationBatch:
    """A conversation in the words of the model.

    Args:
        processor: of LLaVA-OneVision.
        pixels: (T, 3, H, W) uint8.
        turns: questions and answers.
        longest: tokens, native visual ones included, after which the text is cut.
    """
    tokenizer, ids, labels = processor.tokenizer, list[int](), list[int]()
    pixel_values = torch.empty(0)
    for place, (question, answer) in enumerate(turns):
        if place == 0:
            text = f"{_SYSTEM}<|im_start|>user\n{processor.video_token}\n{question}<|im_end|>\n<|im_start|>assistant\n"
            made = processor(text=text, videos=[pixels], return_tensors="pt")
            asked, pixel_values = made["input_ids"][0].tolist(), made["pixel_values_videos"]
        else:
            text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        after = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += asked + said + after
        labels += [_IGNORED] * len(asked) + said + [_IGNORED] * len(after)
    input_ids = torch.tensor([ids[:longest]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values_videos": pixel_values}
    return ConversationBatch(inputs, torch.tensor([labels[:longest]]))


class Conversations(Dataset[ConversationBatch]):
    """Conversations of a manifest in an order drawn anew for every epoch; item n of epoch e has number e * length + n.

    Args:
        items: from `read_manifest`.
        processor: of LLaVA-OneVision.
        frames: most frames of a video.
        longest: most tokens of a conversation.
        seed: of the order; None keeps that of the manifest.
    """

    def __init__(
        self, items: list[Conversation], processor: Any, frames: int, longest: int, seed: int | None = None
    ) -> None:
        self.items, self.processor, self.frames, self.longest, self.seed = items, processor, frames, longest, seed
        self._drawn: tuple[int, array[int]] | None = None

    def order(self, epoch: int) -> array[int]:
        """Places in the manifest; drawn once an epoch, since a corpus has a million."""
        if self._drawn is None or self._drawn[0] != epoch:
            places = array("L", range(len(self.items)))
            if self.seed is not None:
                random.Random(self.seed * 1_000_003 + epoch).shuffle(places)
            self._drawn = (epoch, places)
        return self._drawn[1]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> ConversationBatch:
        epoch, place = divmod(number, len(self.items))
        order = self.order(epoch)
        for further in range(min(_TRIES, len(order))):
            item = self.items[order[(place + further) % len(order)]]
            try:
                pixels = read_frames(item.video, count=self.frames).pixels
            except VideoError as error:
                _LOG.warning("left out: %s", error)
                continue
            made = encode(self.processor, pixels, item.turns, self.longest)
            if (made.labels >= 0).any():
                return made
            # Nothing to learn; the loss would be no number, and the video's placeholders may be cut too.
            _LOG.warning("left out: %s: its first answer lies beyond %d tokens", item.video, self.longest)
        raise ValueError(f"none of {min(_TRIES, len(order))} videos in a row could be used; the last was {item.video}")


class VideoConversationsDataModule(ResumableDataModule):
    """One conversation a batch, as published; `accumulate_grad_batches` and devices make batches larger.

    Args:
        manifest: training conversations.
        dev_manifest: conversations to validate on; none skips validation.
        processor: that of the model, folder or Hub id.
        frames: most frames of a video, spread over it.
        max_length: most tokens of a conversation, native visual ones included.
        workers: processes that read videos.
        seed: of the order.
    """

    def __init__(
        self,
        manifest: str,
        dev_manifest: str | None = None,
        processor: str = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        frames: int = 32,
        max_length: int = 32_768,
        workers: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Reads the manifests and the processor."""
        from transformers import AutoProcessor

        h: Any = self.hparams
        processor = AutoProcessor.from_pretrained(h.processor)
        self.train = Conversations(read_manifest(h.manifest), processor, h.frames, h.max_length, h.seed)
        self.dev = None
        if h.dev_manifest is not None:
            self.dev = Conversations(read_manifest(h.dev_manifest), processor, h.frames, h.max_length)

    def train_dataloader(self) -> DataLoader[ConversationBatch]:
        """The conversations after the last."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = Onward(self.consumed, len(self.train), rank, world)
        return DataLoader(self.train, None, sampler=sampler, num_workers=self.hparams["workers"])

    def val_dataloader(self) -> list[DataLoader[ConversationBatch]]:
        """The development conversations, if there are any."""
        return [] if self.dev is None else [DataLoader(self.dev, None, num_workers=self.hparams["workers"])]
