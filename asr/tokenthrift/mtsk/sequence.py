"""The sequence the language model reads: start, audio tokens, video tokens, prompt, text, end.

Source: Llama-MTSK (arXiv 2503.06362), section 3; layout and prompts as in the authors' code:

    [BOS] <audio> A .. </audio> <video> V .. </video> Transcribe speech and video to text. text .. [EOS]

A task without a modality has no block for it. The transcript is tokenized on its own, so no space joins it to the
prompt. The loss sees the text and EOS.

Differs from the published code: the embeddings of the four markers are trained (there they are new rows of a frozen
table, random forever), and rows of a batch have the length that is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from tokenthrift.padding import pad_rows

__all__ = ["IGNORED", "MARKERS", "PROMPTS", "Encoded", "Rows", "label_rows"]

MARKERS: Final = ("<audio>", "</audio>", "<video>", "</video>")
PROMPTS: Final = {
    (True, False): "Transcribe speech to text.",
    (False, True): "Transcribe video to text.",
    (True, True): "Transcribe speech and video to text.",
}
IGNORED: Final = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Encoder states of a batch, made once and compressed at any rates.

    Attributes:
        audio: (B, N, D) states, 50 a second, or None.
        audio_lengths: (B,) states of each item.
        video: (B, T, D) states, 25 a second, or None.
        video_lengths: (B,) states of each item.
    """

    audio: Tensor | None = None
    audio_lengths: Tensor | None = None
    video: Tensor | None = None
    video_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("audio", "video"):
            if (getattr(self, name) is None) != (getattr(self, f"{name}_lengths") is None):
                raise ValueError(f"{name} states and {name}_lengths go together")
        if self.audio is None and self.video is None:
            raise ValueError("there are neither audio nor video states")
        if self.audio is not None and self.video is not None and len(self.audio) != len(self.video):
            raise ValueError(f"{len(self.audio)} items with audio but {len(self.video)} with video")

    def __len__(self) -> int:
        states = self.audio if self.audio is not None else self.video
        return 0 if states is None else len(states)

    def select(self, rows: Sequence[int] | Tensor) -> Encoded:
        """Some of the items, in the order given."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value[torch.as_tensor(rows)] for name, value in given.items()})


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of sequences.

    Attributes:
        embeddings: (B, L, H), zero in padding.
        mask: (B, L) bool, true where there is a position.
        labels: (B, L) the token that stands at each position, `IGNORED` where the loss does not look.
    """

    embeddings: Tensor
    mask: Tensor
    labels: Tensor


def label_rows(prefixes: Sequence[int], texts: Sequence[Tensor], bos: int | None) -> Tensor:
    """(B, L) labels of right-padded sequences.

    Args:
        prefixes: positions before the text of each item.
        texts: (n_i,) tokens of each text, EOS included.
        bos: stands at the first position, as published; nothing predicts it.
    """
    rows = []
    for length, text in zip(prefixes, texts, strict=True):
        row = torch.cat([text.new_full((length,), IGNORED), text])
        if bos is not None:
            row[0] = bos
        rows.append(row)
    return pad_rows(rows, value=IGNORED)[0]
