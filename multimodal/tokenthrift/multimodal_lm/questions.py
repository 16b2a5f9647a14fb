"""Native tokens of media and questions about them, on disk: what the encoders make is computed once.

A folder has the parts `train`, `dev` and `test`. Each holds `KIND.safetensors` for every kind of media (`embeddings`
(sum of N, D), all items one after another, and `lengths` (items,)) and `questions.jsonl` with a line
`{"kind": ..., "item": ..., "task": ..., "question": ..., "answer": ...}` for each question; `tasks.json` lists the
answers that each task has. The format is this project's own; recipes/multimodal/features.py writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from tokenthrift.multimodal_lm.prompts import Media, Prompt
from tokenthrift.tokens import TokenBatch
from tokenthrift.training.sampler import Key, item_rng

__all__ = ["LABELS", "Example", "Questions", "prompt_of"]

LABELS: Final = {"image": "Picture:", "video": "Clip:", "audio": "Sound:", "lips": "Lips:"}


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A question about one of the media of a prompt.

    Attributes:
        media: kinds and native tokens, one item each, in reading order; the question is about one of them.
        kind: of that one.
        task: what is asked.
        question: in words.
        answer: in words.
        seed: of what is drawn for it in training.
    """

    media: list[tuple[str, TokenBatch]]
    kind: str
    task: str
    question: str
    answer: str
    seed: int = 0


def prompt_of(example: Example) -> Prompt:
    """The example as a prompt; its answer follows after a space."""
    parts: list[str | Media] = []
    for kind, tokens in example.media:
        parts += [LABELS[kind], Media(kind, tokens)]
    return [*parts, f"Question: {example.question} Answer:"]


class Questions(Dataset[Example]):
    """The questions of a part, by number or by `(epoch, index)`.

    Args:
        folder: of the part.
        grids: frames, rows and columns of the items of a kind, where they have some.
        others: share of the prompts that also hold one medium of every other kind, drawn anew each epoch.
        seed: of what is drawn.
    """

    def __init__(
        self,
        folder: Path,
        *,
        grids: Mapping[str, Sequence[int]] | None = None,
        others: float = 0.0,
        seed: int = 0,
    ) -> None:
        file = folder / "questions.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}; write it with recipes/multimodal/features.py")
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        self.others, self.seed = others, seed
        self.grids = {kind: (int(t), int(h), int(w)) for kind, (t, h, w) in (grids or {}).items()}
        self.starts: dict[str, Tensor] = {}
        self.files: dict[str, Any] = {}
        for kind in sorted({row["kind"] for row in self.rows}):
            self.files[kind] = safe_open(folder / f"{kind}.safetensors", framework="pt")
            lengths = self.files[kind].get_tensor("lengths")
            self.starts[kind] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def __len__(self) -> int:
        return len(self.rows)

    def tokens(self, kind: str, item: int) -> TokenBatch:
        """Native tokens of one item."""
        start, stop = self.starts[kind][item : item + 2].tolist()
        embeddings = self.files[kind].get_slice("embeddings")[start:stop].float()
        grids = [self.grids[kind]] if kind in self.grids else None
        return TokenBatch.from_items([embeddings], None, grids)

    def __getitem__(self, key: int | Key) -> Example:
        epoch, index = (0, key) if isinstance(key, int) else key
        row, rng = self.rows[index], item_rng(self.seed, epoch, index)
        media = {row["kind"]: row["item"]}
        if rng.random() < self.others:
            for kind, starts in self.starts.items():
                media.setdefault(kind, rng.randrange(len(starts) - 1))
        order = sorted(media, key=list(LABELS).index)
        return Example(
            [(kind, self.tokens(kind, media[kind])) for kind in order],
            row["kind"],
            row["task"],
            row["question"],
            row["answer"],
            rng.getrandbits(63),
        )
