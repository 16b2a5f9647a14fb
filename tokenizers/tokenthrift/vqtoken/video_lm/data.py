"""Videos with conversations as training data for LLaVA-OneVision: a manifest, read as it is needed.

Source: the published recipe of VQToken (arXiv 2503.16980; finetune_ov_all.sh): up to 32 frames spread over the clip,
one placeholder for the video in the first turn of a ChatML conversation, loss on the answers only. Differs: a manifest
of one JSON object a line, `{"video": "a.mp4", "turns": [{"question": "...", "answer": "..."}]}`, with paths relative to
it. A video that cannot be read, or whose first answer is cut off, is logged and replaced by the next one of the
manifest; it does not end the run. The order depends on seed and epoch alone, processes share each epoch, and a resumed
run goes on with the conversations that would have come.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokenthrift.media.video import VideoError, read_frames
from tokenthrift.training.resuming import ResumableDataModule
from tokenthrift.training.sampler import Key, random_batches

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
    """A video file, and questions and answers about it."""

    video: Path
    turns: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class ConversationBatch:
    """One conversation, ready for the model.

    Attributes:
        inputs: arguments of the model: `input_ids` and `attention_mask` (1, L) int64, and `pixel_values_videos`
            (1, T, 3, H, W) floating point, frames as the processor of the model makes them.
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


def encode(processor: Any, pixels: Tensor, turns: tuple[tuple[str, str], ...], max_length: int) -> ConversationBatch:
    """A conversation as token ids.

    Args:
        processor: of LLaVA-OneVision.
        pixels: (T, 3, H, W) uint8.
        turns: questions and answers.
        max_length: tokens, native visual ones included, after which the text is cut.
    """
    tokenizer, ids, labels = processor.tokenizer, list[int](), list[int]()
    pixel_values = torch.empty(0)
    for turn, (question, answer) in enumerate(turns):
        if turn == 0:
            text = f"{_SYSTEM}<|im_start|>user\n{processor.video_token}\n{question}<|im_end|>\n<|im_start|>assistant\n"
            made = processor(text=text, videos=[pixels], return_tensors="pt")
            prompt, pixel_values = made["input_ids"][0].tolist(), made["pixel_values_videos"]
        else:
            text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        target = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        after = tokenizer("\n", add_special_tokens=False)["input_ids"]
        ids += prompt + target + after
        labels += [_IGNORED] * len(prompt) + target + [_IGNORED] * len(after)
    input_ids = torch.tensor([ids[:max_length]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values_videos": pixel_values}
    return ConversationBatch(inputs, torch.tensor([labels[:max_length]]))


class Conversations(Dataset[ConversationBatch]):
    """Conversations of a manifest, by their index or by `(epoch, index)`.

    Args:
        items: from `read_manifest`.
        processor: of LLaVA-OneVision.
        num_frames: most frames of a video.
        max_length: most tokens of a conversation.
    """

    def __init__(self, items: list[Conversation], processor: Any, num_frames: int, max_length: int) -> None:
        self.items, self.processor, self.num_frames, self.max_length = items, processor, num_frames, max_length

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | Key) -> ConversationBatch:
        index = key if isinstance(key, int) else key[1]
        tries = min(_TRIES, len(self.items))
        for further in range(tries):
            item = self.items[(index + further) % len(self.items)]
            try:
                pixels = read_frames(item.video, count=self.num_frames).pixels
            except VideoError as error:
                _LOG.warning("left out: %s", error)
                continue
            made = encode(self.processor, pixels, item.turns, self.max_length)
            if (made.labels >= 0).any():
                return made
            # Nothing to learn from: the loss would be NaN, and the video's placeholders may be cut too.
            _LOG.warning("left out: %s: its first answer lies beyond %d tokens", item.video, self.max_length)
        raise ValueError(f"none of {tries} videos in a row could be used; the last was {item.video}")


def _as_list(conversations: Sequence[ConversationBatch]) -> list[ConversationBatch]:
    """Conversations differ in frames and in length, so they stay apart."""
    return list(conversations)


class VideoConversationsDataModule(ResumableDataModule):
    """One conversation a batch, as published; `accumulate_grad_batches` and devices make batches larger.

    A batch is a list of `ConversationBatch`, of one conversation each. The list has one entry; in the last step of an
    epoch it has two where the conversations do not divide evenly among the processes.

    Args:
        manifest: training conversations.
        dev_manifest: conversations to validate on; without one there is no validation.
        processor: that of the model, folder or Hub id.
        num_frames: most frames of a video, spread over it.
        max_length: most tokens of a conversation, native visual ones included.
        workers: processes that read videos.
        seed: of the order.
    """

    def __init__(
        self,
        manifest: str,
        dev_manifest: str | None = None,
        processor: str = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        num_frames: int = 32,
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
        self.train = Conversations(read_manifest(h.manifest), processor, h.num_frames, h.max_length)
        self.dev = None
        if h.dev_manifest is not None:
            self.dev = Conversations(read_manifest(h.dev_manifest), processor, h.num_frames, h.max_length)

    def train_dataloader(self) -> DataLoader[Any]:
        """The conversations of every epoch in random order, from where this run begins."""
        h: Any = self.hparams
        sampler = random_batches(range(len(self.train)), 1, seed=h.seed)
        return self.training_loader(self.train, sampler, _as_list, h.workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The development conversations, if there are any."""
        return [] if self.dev is None else [self.evaluation_loader(self.dev, 1, _as_list, self.hparams["workers"])]
