"""The small models on which the published samplers were recorded, rebuilt from the arrays stored with the traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCAB, MASK, EOS = 48, 47, 46


def case(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry of the manifest and the arrays of one recorded run."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(entry for entry in manifest["cases"] if entry["name"] == name)
    with np.load(folder / f"{name}.npz") as stored:
        return entry, {key: torch.from_numpy(np.asarray(stored[key])) for key in stored.files}


class Mixer:
    """Each position mixes the embeddings of the others with weights that fall with distance; padding is not seen."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self.arrays = arrays

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        a, embedded = self.arrays, self.arrays["m_E"][ids]
        if prefix := "prompt_embeds" in a:
            embedded = torch.cat([a["prompt_embeds"][rows], embedded], 1)
            mask = torch.cat([torch.ones_like(a["prompt"][rows], dtype=torch.bool), mask], 1)
        positions = torch.arange(embedded.shape[1], dtype=torch.float64)
        weights = torch.exp(-(positions[:, None] - positions).abs() / a["m_tau"]).fill_diagonal_(0.0) * mask[:, None]
        mixed = weights / weights.sum(-1, keepdim=True) @ embedded
        logits = torch.tanh(embedded + a["m_P"][: embedded.shape[1]] + a["m_ctx"] * mixed) @ a["m_U"] + a["m_b"]
        return logits[:, a["prompt"].shape[1] :] if prefix else logits


class Scripted:
    """Says a fixed text, surer beside decided neighbors, unsure at hard slots as long as the canvas is too short."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self.arrays, self.prompt = arrays, arrays["prompt"].shape[1]

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
        for at, row in enumerate(rows.tolist()):
            end = int(mask[at].sum())
            for position in range(self.prompt, end):
                token, confidence = self._says(row, position, end, ids[at])
                logits[at, position] = np.log((1 - confidence) / (VOCAB - 1))
                logits[at, position, token] = np.log(confidence)
        return logits

    def _says(self, row: int, position: int, end: int, ids: Tensor) -> tuple[int, float]:
        a, slot = self.arrays, position - self.prompt
        count = int((a["targets"][row] >= 0).sum())
        if slot >= count:
            return EOS, float(a["eosc"])
        token = int(a["targets"][row, slot])
        if slot in a["hard"][row].tolist() and end - self.prompt < count + int(a["slack"]):
            return token, 0.05
        beside = [p for p in (position - 1, position + 1) if self.prompt - 1 <= p <= end - 1]
        decided = sum(int(ids[p]) != MASK for p in beside)
        return token, min(0.99, float(a["base"][row, slot]) + 0.25 * decided)
