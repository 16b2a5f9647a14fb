"""Trains the head for casing and punctuation: `python punctuation.py MODEL LABELS.jsonl SPEECH OUT`.

LABELS is what `cased_labels.py` wrote: Whisper base's transcripts of training clips. Each is aligned to the reference
words; a word that both wrote has a label. The states of the reference text are computed once, by the frozen model; the
head alone is trained on them, minutes on one core. Every tenth clip is for development and says when to stop. OUT is
MODEL, its files as they are, with `punctuation.safetensors` and a `config.json` that names its width.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.dllm_asr.punctuation import CASES, MARKS, PunctuationHead, labels_of, word_states
from tokenthrift.padding import pad_rows
from tokenthrift.sources import fetch

BATCH = 32


@dataclass(frozen=True)
class Example:
    """The states around the words of a clip, `(W, 2, hidden_size)`, and their labels `(W,)`, -100 where unknown."""

    states: Tensor
    cases: Tensor
    marks: Tensor


@torch.no_grad()
def examples(model: DllmAsr, labels: Sequence[dict[str, Any]], speech: Path) -> list[Example]:
    """What the head learns from: one pass of encoder and decoder over each clip, on its reference text."""
    out: dict[int, Example] = {}
    shard, audio, offset = "", np.empty(0), np.empty(0)
    for i in sorted(range(len(labels)), key=lambda i: labels[i]["shard"]):
        row = labels[i]
        if row["shard"] != shard:
            shard = row["shard"]
            with np.load(speech / shard) as file:
                audio, offset = file["audio"], file["offset"]
        samples = torch.from_numpy(audio[offset[row["row"]] : offset[row["row"] + 1]].astype(np.float32) / 32_768)
        cases, marks = labels_of(row["text"], row["cased"])
        if len(samples) > 30 * 16_000 or not any(case >= 0 for case in cases):
            continue
        states, lengths = (part.clone() for part in model.encode([samples]))  # no inference tensors
        memory = model.adapter(states, lengths)
        states, mask = word_states(model.backbone, model.vocabulary, [row["text"]], *memory)
        count = int(mask.sum())
        out[i] = Example(states[0, :count].clone(), torch.tensor(cases[:count]), torch.tensor(marks[:count]))
    return [out[i] for i in sorted(out)]


def collate(rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, mask, casing and marks of a batch."""
    states, mask = pad_rows([row.states for row in rows])
    cases, marks = (pad_rows([getattr(row, name) for row in rows], value=-100)[0] for name in ("cases", "marks"))
    return states, mask, cases, marks


def loss_of(head: PunctuationHead, rows: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of casing and mark."""
    states, mask, cases, marks = collate(rows)
    case, mark = head(states, mask)
    return F.cross_entropy(case.flatten(0, 1), cases.flatten()) + F.cross_entropy(mark.flatten(0, 1), marks.flatten())


@torch.no_grad()
def scores(head: PunctuationHead, rows: Sequence[Example]) -> dict[str, float]:
    """Share of words with the right casing and mark, and F1 of the words that are not plain."""
    found: dict[str, list[Tensor]] = {"case": [], "mark": []}
    truth: dict[str, list[Tensor]] = {"case": [], "mark": []}
    for start in range(0, len(rows), BATCH):
        states, mask, cases, marks = collate(rows[start : start + BATCH])
        for name, guess, labels in zip(("case", "mark"), head(states, mask), (cases, marks), strict=True):
            known = labels >= 0
            found[name].append(guess.argmax(-1)[known])
            truth[name].append(labels[known])
    out = {}
    for name in found:
        guess, label = torch.cat(found[name]), torch.cat(truth[name])
        right = int(((guess == label) & (label > 0)).sum())
        out[f"{name}_accuracy"] = float((guess == label).float().mean())
        out[f"{name}_f1"] = 2 * right / max(1, int((guess > 0).sum()) + int((label > 0).sum()))
    return out


def train(head: PunctuationHead, rows: list[Example], dev: list[Example], epochs: int, rate: float) -> dict[str, float]:
    """Trains a head and leaves it as it was best on the development clips; its scores there."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    best, lowest = {}, float("inf")
    for _ in range(epochs):
        head.train()
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), BATCH):
            loss = loss_of(head, [rows[i] for i in order[start : start + BATCH]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        head.eval()
        with torch.no_grad():
            now = float(loss_of(head, dev))
        if now < lowest:
            lowest, best = now, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(best)
    return scores(head, dev)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("labels", type=Path, help="file, by cased_labels.py")
    parser.add_argument("speech", type=Path, help="folder of the shards that it names")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = DllmAsr.from_pretrained(arguments.model)
    labels = [json.loads(line) for line in arguments.labels.read_text(encoding="utf-8").splitlines()]
    found = examples(model, labels, arguments.speech)
    dev = found[::10]
    rows = [row for i, row in enumerate(found) if i % 10]
    head = PunctuationHead(model.config.backbone.hidden_size, arguments.hidden_size)
    result = train(head, rows, dev, arguments.epochs, arguments.rate)
    words = sum(int((row.cases >= 0).sum()) for row in rows)
    print(f"{len(rows)} clips, {words} words with labels; {len(dev)} clips for development")
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()), f"({len(CASES)} x {len(MARKS)} classes)")
    source = fetch(arguments.model, ("config.json", "model.safetensors", *model.needed_files(model.config)))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir() if source.resolve() != arguments.out.resolve() else ():
        if path.is_file():
            shutil.copyfile(path, arguments.out / path.name)
    model.punctuation = head
    model.write_assets(arguments.out)
    fields = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"punctuation": arguments.hidden_size}
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (arguments.out / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
