"""Whisper's encoder fine-tuned on cropped audio: `python cropped_encoder.py SPEECH OUT [--whisper CHECKPOINT]`.

Whisper was trained on 30 s, always; over a short recording alone its states drift and words are misread. Here a copy of
the encoder reads recordings as they are, with up to `--trailing-silence` seconds of silence, and learns the states that
the frozen original has of the same recording filled to 30 s (relative squared error; no text is needed).
Half of what it reads is real speech (shards `9*`), half synthetic; clips (of 20 s at most) and excerpts of 0.3 to 8 s,
augmented as in `features.py`. `OUT` is the checkpoint's folder with the new encoder in it, to be given as `--whisper`.
The error on development recordings is printed with and without the silence. A stopped run goes on from
`OUT/training.pt`, with the options it was begun with.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from features import PASS_SECONDS, RATE, augment, fingerprint, load_encoder, read_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenthrift.media.audio import read_audio
from tokenthrift.padding import length_mask
from tokenthrift.sources import fetch
from tokenthrift.training.optim import OptimConfig, cosine_schedule
from tokenthrift.training.precision import cpu_has_bf16
from tokenthrift.whisper import WhisperEncoder, log_mel, pad_mels, states_of

FILES = ("config.json", "model.safetensors", "tokenizer.json")
SHARE_WHOLE, LONGEST_WHOLE = 0.5, 20.0  # seconds
SHORTEST, LONGEST = 0.3, 8.0  # seconds of an excerpt
GROUP = 8  # batches drawn together, so that each holds like lengths
SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Speech:
    """Clips `(samples,)` int16 of a shard, without those of development sentences, and all of them end to end."""

    clips: list[Tensor]
    joined: Tensor


def read_speech(shard: Path) -> Speech:
    with np.load(shard) as data:
        audio, offset, rows = torch.from_numpy(data["audio"]), data["offset"], json.loads(str(data["rows"]))
    clips = [audio[a:b] for a, b, r in zip(offset, offset[1:], rows, strict=False) if r["split"] == "train"]
    return Speech(clips, torch.cat([audio[:0], *clips]))


def trains(shard: Path) -> bool:
    with np.load(shard) as data:
        return any(row["split"] == "train" for row in json.loads(str(data["rows"])))


def excerpt(speech: Speech, rng: random.Random) -> Tensor:
    """A clip, or an excerpt of the clips end to end, log-uniform in length; float in [-1, 1]."""
    if rng.random() < SHARE_WHOLE:
        piece = rng.choice(speech.clips)[: int(LONGEST_WHOLE * RATE)]
    else:
        size = int(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))) * RATE)
        start = rng.randrange(max(1, len(speech.joined) - size))
        piece = speech.joined[start : start + size]
    return piece.float() / 32768


def batches(
    real: list[Speech], synthetic: list[Path], noises: list[Tensor], rooms: list[Tensor], size: int, start: int
) -> Iterator[list[Tensor]]:
    """Endless batches of recordings of like length, from the `start`-th on; the n-th is the same in every run."""
    weights = [len(speech.joined) for speech in real]
    for number in range(start // GROUP, 1 << 31):
        rng = random.Random(number)
        count = size * GROUP // (2 if real and synthetic else 1)
        drawn = [excerpt(speech, rng) for speech in (rng.choices(real, weights, k=count) if real else ())]
        if synthetic:
            speech = read_speech(rng.choice(synthetic))
            drawn += [excerpt(speech, rng) for _ in range(count)]
        padded = sorted((augment(piece, rng, noises, rooms) for piece in drawn), key=len)
        made = [padded[i : i + size] for i in range(0, len(padded), size)]
        rng.shuffle(made)
        yield from made[start % GROUP if number == start // GROUP else 0 :]


def states(encoder: WhisperEncoder, audio: list[Tensor], silence: float) -> tuple[Tensor, Tensor]:
    """`(B, N, width)` states of recordings with `silence` seconds after them (30 s in all), and their lengths."""
    most = PASS_SECONDS * RATE
    padded = [F.pad(x, (0, max(0, min(round(silence * RATE), most - len(x))))) for x in audio]
    mels, frames = pad_mels([log_mel(x, encoder.conv1.in_channels) for x in padded])
    lengths = torch.tensor([states_of(len(x)) for x in audio])
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
        encoded: Tensor = encoder(mels, frames)
    return encoded[:, : int(lengths.max())].float(), lengths


def relative_error(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Squared distance over the states of the recordings, as a share of the teacher's squared size."""
    valid = length_mask(lengths, teacher.shape[1])
    return (student - teacher)[valid].square().sum() / teacher[valid].square().sum()


@torch.no_grad()
def development_error(student: WhisperEncoder, teacher: WhisperEncoder, audio: list[Tensor], silence: float) -> float:
    found = [relative_error(states(student, [x], silence)[0], *states(teacher, [x], 30.0)) for x in audio]
    return float(torch.stack(found).mean())


def save_checkpoint(folder: Path, source: Path, encoder: WhisperEncoder) -> None:
    """`source` with another encoder, whole or not at all."""
    for name in ("config.json", "tokenizer.json"):
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
    parser.add_argument(
        "--trailing-silence", type=float, default=2.0, help="most seconds of silence (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    source = fetch(arguments.whisper, FILES)
    shards = [shard for shard in sorted(arguments.speech.glob("*.npz")) if trains(shard)]
    real = [read_speech(shard) for shard in shards if shard.name.startswith("9")]
    synthetic = [shard for shard in shards if not shard.name.startswith("9")]
    if not shards:
        parser.error(f"{arguments.speech} holds no shards of speech to train on")
    dev = [read_audio(path) for path in sorted(arguments.dev.glob("*.flac"))] if arguments.dev else []
    if arguments.dev and not dev:
        parser.error(f"--dev: {arguments.dev} holds no .flac recordings")
    noises, rooms = read_folder(arguments.noise, "noise*.flac"), read_folder(arguments.noise, "rir*.flac")
    arguments.out.mkdir(parents=True, exist_ok=True)
    teacher, student = load_encoder(str(source)).requires_grad_(False), load_encoder(str(source)).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    rates = OptimConfig(learning_rate=arguments.learning_rate, warmup_steps=20, min_lr=1e-6)
    schedule = cosine_schedule(optimizer, rates, arguments.steps)
    first, state = 0, arguments.out / "training.pt"
    begun = {name: getattr(arguments, name) for name in ("steps", "batch", "trailing_silence", "learning_rate")}
    begun["encoder"] = fingerprint(teacher)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["begun"] != begun:
            parser.error(f"{state} was begun with {saved['begun']}, not with {begun}: give another folder")
        student.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    feed = batches(real, synthetic, noises, rooms, arguments.batch, first)
    started, losses = time.perf_counter(), []
    for step in range(first, arguments.steps + 1):
        if step % SAVE_EVERY == 0 or step == arguments.steps:
            save_checkpoint(arguments.out, source, student)
            kept: dict[str, Any] = {"encoder": student.state_dict(), "optimizer": optimizer.state_dict()}
            kept |= {"schedule": schedule.state_dict(), "step": step, "begun": begun}
            torch.save(kept, state.with_suffix(".partial"))
            os.replace(state.with_suffix(".partial"), state)
            shown = [
                f"{t:g} s {development_error(student, teacher, dev, t):.4f}"
                for t in (0.0, arguments.trailing_silence)
                if dev
            ]
            mean = sum(losses) / max(1, len(losses))
            print(f"step {step}: {mean:.4f}", *shown, f"{time.perf_counter() - started:.0f} s", sep=" | ", flush=True)
            losses = []
        if step == arguments.steps:
            break
        audio = next(feed)
        with torch.no_grad():
            target, lengths = states(teacher, audio, 30.0)
        silence = random.Random(step).uniform(0.0, arguments.trailing_silence)
        loss = relative_error(states(student, audio, silence)[0], target, lengths)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())


if __name__ == "__main__":
    main()
