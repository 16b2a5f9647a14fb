"""A small visual encoder of AV-HuBERT's shape, taught visemes: `python lip_encoder.py SPEECH/train OUT`.

The published AV-HuBERT learns from 1,759 h of faces, cannot be had everywhere, and takes a second per second of video
on two cores. This one (2 layers of 128, ResNet of 8 to 64 channels) learns to name the viseme of every frame of
rendered mouths, drawn as they are needed, with crops and masks that change. `OUT/avhubert.safetensors` has the key
names of the public checkpoints. It has seen synthetic mouths only and is named so. A checkpoint is kept; a stopped run
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mouth import face_of
from safetensors.torch import save_file
from talk import RATE, pictures
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from visemes import SHAPES, frame_visemes

from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, normalize
from tokenthrift.mtsk.external import AVHUBERT_FILE
from tokenthrift.mtsk.training.augmentation import mask_video
from tokenthrift.training.precision import cpu_has_bf16

CROP, SHRINK = 88, 2  # height of a crop; pixels of it that `real_lips.py` and `rendered_lips.py` average
WIDTH, LAYERS, FFN, CHANNELS = 128, 2, 512, (8, 16, 32, 64)


class Teacher(nn.Module):
    """The encoder and a linear reading of visemes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AvHubert(WIDTH, LAYERS, WIDTH // 64, FFN, CHANNELS)
        self.encoder.feature_extractor_audio.requires_grad_(False)
        self.read = nn.Linear(WIDTH, len(SHAPES))

    def forward(self, video: Tensor, lengths: Tensor) -> Tensor:
        logits: Tensor = self.read(self.encoder(video, lengths))
        return logits


def rows_of(shard: Path) -> list[tuple[dict[str, Any], int]]:
    """(row, samples) of every utterance of a shard."""
    with np.load(shard) as data:
        return list(zip(json.loads(str(data["rows"])), np.diff(data["offset"]).tolist(), strict=True))


def batches(shards: list[Path], size: int, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches from the `first` on: normalized video, lengths, visemes (-100 in padding)."""
    number = 0
    while True:
        for shard in shards:
            rows = rows_of(shard)
            for start in range(0, len(rows) - size + 1, size):
                number += 1
                if number <= first:
                    continue
                rng, videos, targets = random.Random(number), [], []
                for row, samples in rows[start : start + size]:
                    seen = pictures({**row, "seed": rng.getrandbits(30)}, samples, 92)
                    top, left = rng.randrange(5), rng.randrange(5)
                    seen = mask_video(seen[:, top : top + 88, left : left + 88], rng, longest=5)
                    videos.append(normalize(seen))
                    lead = face_of(row["speaker"]).lead
                    targets.append(torch.from_numpy(frame_visemes(row["phonemes"], samples / RATE, lead)))
                lengths = torch.tensor([len(video) for video in videos])
                yield pad_sequence(videos, True), lengths, pad_sequence(targets, True, padding_value=-100)


def options(about: str | None, source: str, steps: int, batch: int) -> argparse.ArgumentParser:
    """Those of a script that trains a visual encoder; `source` is the name of its first argument."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(source, type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help="clips of a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    return parser


def save_run(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint that is whole or not there."""
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def save_encoder(encoder: AvHubert, folder: Path) -> None:
    """Writes `avhubert.safetensors` into a folder."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, folder / AVHUBERT_FILE, {"format": "pt"})


def main() -> None:
    arguments = options(__doc__, "shards", 300, 8).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Teacher()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, arguments.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.rate, arguments.steps, pct_start=0.1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done = arguments.out / "training.ckpt", 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["step"]
    model.train()
    right: list[float] = []
    began = time.process_time()
    stream = batches(sorted(arguments.shards.glob("*.npz")), arguments.batch, done)
    for step in range(done + 1, arguments.steps + 1):
        video, lengths, target = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            logits = model(video, lengths).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        real = target >= 0
        right.append((logits.argmax(2)[real] == target[real]).float().mean().item())
        if step % 20 == 0 or step == arguments.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save_run(kept, state | {"schedule": schedule.state_dict()})
            share, seconds = sum(right[-20:]) / len(right[-20:]), time.process_time() - began
            print(f"step {step}: loss {loss:.3f}, frames right {share:.1%}, {seconds:.0f} s of CPU", flush=True)
    save_encoder(model.encoder, arguments.out)


if __name__ == "__main__":
    main()
