"""Whisper's encoder taught to hear cropped audio: `python cropped_encoder.py SPEECH OUT [--whisper CHECKPOINT]`.

Whisper was trained on 30 s, always; over a short recording alone its states drift and words are misread. Here a copy of
the encoder hears recordings as they are, with up to `--tail` seconds of silence, and learns the states that the frozen
original has of the same recording filled to 30 s (relative squared error; no text is needed). Half of what it hears is
real speech (shards `9*`), half synthetic; whole clips and excerpts of 0.3 to 8 s, augmented as in `features.py`.
`OUT` is the checkpoint's folder with the new encoder in it, to be given wherever `--whisper` is asked for. The error on
development recordings is printed with and without the tail. A stopped run goes on from `OUT/training.pt`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from features import RATE, augment, followed_by_silence, load_encoder, read_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenthrift.media.audio import read_audio
from tokenthrift.sources import fetch
from tokenthrift.training.schedule import warmup_cosine
from tokenthrift.whisper import WhisperEncoder, length_mask, states_of

FILES = ("config.json", "model.safetensors", "tokenizer.json")
SHARE_WHOLE, SHORTEST, LONGEST = 0.5, 0.3, 8.0


def train_clips(shard: Path) -> list[Tensor]:
    """Clips of a shard as int16, without those of development sentences."""
    with np.load(shard) as data:
        audio, offset, rows = torch.from_numpy(data["audio"]), data["offset"], json.loads(str(data["rows"]))
    return [audio[a:b] for a, b, r in zip(offset, offset[1:], rows, strict=False) if r["split"] == "train"]


def excerpts(clips: list[Tensor], count: int, rng: random.Random) -> list[Tensor]:
    """Whole clips and excerpts of clips end to end, log-uniform in length, float in [-1, 1]."""
    speech, out = torch.cat(clips), []
    for _ in range(count):
        if rng.random() < SHARE_WHOLE:
            piece = rng.choice(clips)[: 20 * RATE]
        else:
            size = int(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) * RATE)
            start = rng.randrange(max(1, len(speech) - size))
            piece = speech[start : start + size]
        out.append(piece.float() / 32768)
    return out


def batches(
    real: list[Path], synthetic: list[Path], noises: list[Tensor], rooms: list[Tensor], size: int, start: int
) -> Iterator[list[Tensor]]:
    """Endless batches of recordings of like length, from the `start`-th on; the n-th is the same in every run."""
    kept = [train_clips(shard) for shard in real]
    weights = [sum(map(len, clips)) for clips in kept]
    group = 8  # batches drawn together, so that each holds like lengths
    for number in range(start // group, 1 << 31):
        rng = random.Random(number)
        half = size * group // 2 if kept and synthetic else size * group
        drawn = []
        for clips in rng.choices(kept, weights, k=half) if kept else []:
            drawn += excerpts(clips, 1, rng)
        if synthetic:
            drawn += excerpts(train_clips(rng.choice(synthetic)), half, rng)
        heard = sorted((augment(piece, rng, noises, rooms) for piece in drawn), key=len)
        made = [heard[i : i + size] for i in range(0, len(heard), size)]
        rng.shuffle(made)
        yield from made[start % group if number == start // group else 0 :]


def states(encoder: WhisperEncoder, audio: list[Tensor], tail: float) -> tuple[Tensor, Tensor]:
    """`(B, N, width)` states of recordings that `tail` seconds of silence follow, and the states of each."""
    lengths = torch.tensor([states_of(len(x)) for x in audio])
    with torch.autocast("cpu", torch.bfloat16):
        encoded: Tensor = encoder(*followed_by_silence(audio, tail, encoder.conv1.in_channels))
    return encoded[:, : int(lengths.max())].float(), lengths


def relative_error(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Squared distance over the states of the recordings, as a share of the teacher's squared size."""
    valid = length_mask(lengths, teacher.shape[1])
    return (student - teacher)[valid].square().sum() / teacher[valid].square().sum()


@torch.no_grad()
def development_error(student: WhisperEncoder, teacher: WhisperEncoder, audio: list[Tensor], tail: float) -> float:
    found = [relative_error(states(student, [x], tail)[0], *states(teacher, [x], 30.0)) for x in audio]
    return float(torch.stack(found).mean())


def save_checkpoint(folder: Path, source: Path, encoder: WhisperEncoder) -> None:
    """`source` with another encoder, whole or not at all."""
    for name in FILES:
        if name != "model.safetensors" and (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    tensors = load_file(source / "model.safetensors")
    prefix = "model.encoder." if any(key.startswith("model.encoder.") for key in tensors) else "encoder."
    ours = {prefix + name: weight.contiguous() for name, weight in encoder.state_dict().items()}
    save_file(tensors | {k: v.to(tensors[k].dtype) for k, v in ours.items()}, folder / "partial", {"format": "pt"})
    os.replace(folder / "partial", folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="folder of speech shards, from synthesise.py and recordings.py")
    parser.add_argument("out", type=Path)
    parser.add_argument("--whisper", default="openai/whisper-tiny.en", help="transformers checkpoint: folder or Hub id")
    parser.add_argument("--noise", type=Path, help="folder of noise*.flac and rir*.flac")
    parser.add_argument("--dev", type=Path, help="folder of development recordings")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tail", type=float, default=2.0, help="most seconds of silence heard (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    source = fetch(arguments.whisper, FILES[:2])
    arguments.out.mkdir(parents=True, exist_ok=True)
    teacher, student = load_encoder(str(source)).requires_grad_(False), load_encoder(str(source)).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    schedule = warmup_cosine(optimizer, arguments.steps, 20)
    first, state = 0, arguments.out / "training.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        student.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    shards = sorted(arguments.speech.glob("*.npz"))
    real, synthetic = ([s for s in shards if s.name.startswith("9") == flag] for flag in (True, False))
    noises, rooms = read_folder(arguments.noise, "noise*.flac"), read_folder(arguments.noise, "rir*.flac")
    dev = [read_audio(path) for path in sorted(arguments.dev.glob("*.flac"))] if arguments.dev else []
    feed = batches(real, synthetic, noises, rooms, arguments.batch, first)
    started, losses = time.perf_counter(), []
    for step in range(first, arguments.steps + 1):
        if step % 50 == 0 or step == arguments.steps:
            save_checkpoint(arguments.out, source, student)
            kept = {"encoder": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(kept | {"schedule": schedule.state_dict(), "step": step}, state.with_suffix(".partial"))
            os.replace(state.with_suffix(".partial"), state)
            shown = [f"{t:g} s {development_error(student, teacher, dev, t):.4f}" for t in (0.0, arguments.tail) if dev]
            mean = sum(losses) / max(1, len(losses))
            print(f"step {step}: {mean:.4f}", *shown, f"{time.perf_counter() - started:.0f} s", sep=" | ", flush=True)
            losses = []
        if step == arguments.steps:
            break
        audio = next(feed)
        with torch.no_grad():
            wanted, lengths = states(teacher, audio, 30.0)
        tail = random.Random(step).uniform(0.0, arguments.tail)
        loss = relative_error(states(student, audio, tail)[0], wanted, lengths)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())


if __name__ == "__main__":
    main()
