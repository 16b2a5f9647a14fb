"""The noise of a crowd from real voices: `python crowd.py MANIFEST OUT.flac --split train`.

As the babble of the published training: so many speakers at once, each saying one recording after another.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from tokenthrift.media.audio import read_audio

RATE = 16_000


def crowd(voices: list[list[Path]], seconds: float, rng: random.Random) -> Tensor:
    """(samples,) of all voices at equal power, each from a random place of its own string of recordings.

    Args:
        voices: the recordings of each.
        seconds: of the result.
        rng: chooses.
    """
    size = int(seconds * RATE)
    total = torch.zeros(size)
    for files in voices:
        parts: list[Tensor] = []
        while sum(map(len, parts)) < size:
            parts.append(read_audio(rng.choice(files)))
        voice = torch.cat(parts)
        start = rng.randrange(len(voice) - size + 1)
        total += voice[start : start + size] / voice.square().mean().sqrt().clamp_min(1e-4)
    return total / total.abs().max() * 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", help="only lines of this split")
    parser.add_argument("--voices", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files: dict[str, list[Path]] = {}
    for row in map(json.loads, arguments.manifest.read_text(encoding="utf-8").splitlines()):
        if arguments.split in (None, row.get("split")):
            files.setdefault(row["speaker"], []).append(arguments.manifest.parent / row["audio_filepath"])
    rng = random.Random(arguments.seed)
    names = rng.sample(sorted(files), min(arguments.voices, len(files)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(arguments.out, crowd([files[name] for name in names], arguments.seconds, rng).numpy(), RATE)
    print(f"{len(names)} voices")


if __name__ == "__main__":
    main()
