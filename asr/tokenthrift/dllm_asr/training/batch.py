"""Batches of dLLM-ASR: encoder states that are cached, or recordings that the module encodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.dllm_asr.draft import DraftWord
from tokenthrift.padding import pad_rows

__all__ = ["AudioBatch", "Batch", "Recording", "Utterance", "collate", "collate_audio"]


@dataclass(frozen=True, slots=True)
class Utterance:
    """Cached encoder states of a recording.

    Attributes:
        states: `(n, hidden_size)`.
        text: the words spoken.
        draft: what the CTC head wrote, where that is known.
        seed: of everything that training draws for it; another one in every epoch.
    """

    states: Tensor
    text: str
    draft: Sequence[DraftWord] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """Sound that has not been encoded: `(samples,)` mono at 16 kHz, and the words spoken."""

    audio: Tensor
    text: str


@dataclass(slots=True)
class Batch:
    """Utterances side by side.

    Attributes:
        states: `(B, N, hidden_size)`, zero after each utterance.
        lengths: `(B,)` states of each.
        texts: the words spoken.
        drafts: what the CTC head wrote; empty where that is not known.
        seeds: of everything that training draws for each.
    """

    states: Tensor
    lengths: Tensor
    texts: list[str]
    drafts: list[Sequence[DraftWord]]
    seeds: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return Batch(self.states.to(device), self.lengths.to(device), self.texts, self.drafts, self.seeds)


@dataclass(slots=True)
class AudioBatch:
    """Recordings side by side.

    Attributes:
        audio: `(samples,)` of each.
        texts: the words spoken.
    """

    audio: list[Tensor]
    texts: list[str]

    def to(self, device: torch.device | str) -> AudioBatch:
        """The batch on another device."""
        return AudioBatch([samples.to(device) for samples in self.audio], self.texts)


def collate(items: Sequence[Utterance]) -> Batch:
    """Pads utterances to the longest."""
    states, mask = pad_rows([item.states.float() for item in items])
    texts, drafts = [item.text for item in items], [item.draft for item in items]
    return Batch(states, mask.sum(1), texts, drafts, [item.seed for item in items])


def collate_audio(items: Sequence[Recording]) -> AudioBatch:
    """Recordings are padded when they are encoded."""
    return AudioBatch([item.audio for item in items], [item.text for item in items])
