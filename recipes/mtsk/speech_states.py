"""Encoder states of real speech: `python speech_states.py MANIFEST OUT --noise DIR`.

As `states.py`, for a manifest whose lines have a `split` and no pictures. Pass 0 over the training recordings is clean;
in each further one a recording gets a room by chance and noise at -5 to 20 dB or, one time in seven, none, half of it a
crowd (`crowd.py`). With `--avhubert`, for a manifest of `align.py`, each recording also gets the states of a mouth that
is rendered from its phonemes, anew in each pass: real voice, rendered lips. Development recordings stay as they are.
Recordings of more than 30 s are left out. What is there is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from rendered import mouth
from states import AudioStates, VideoStates, augmentation_of, options, save_states
from torch import Tensor

from tokenthrift.media.audio import read_audio

SHARD = 400  # recordings
SECONDS = 30.0  # one pass of the encoder


def rows_of(manifest: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a split whose recordings the encoder reads in one pass."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.get("split") == split and row["duration"] < SECONDS]


def lips(encoder: VideoStates, row: dict[str, Any], samples: int, rng: random.Random) -> Tensor:
    """States of a rendered mouth, the crop anywhere in the picture."""
    top, left = rng.randrange(5), rng.randrange(5)
    frames = mouth(row, samples, rng.getrandbits(30), 92)[:, top : top + 88, left : left + 88]
    return encoder.encode(frames)


def main() -> None:
    parser = options(__doc__, "manifest", lips=False)
    parser.add_argument("--crowd", type=Path, help="a crowd's noise, half of all noise")
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 1], help="numbers of passes; 0 is clean")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder, augmentation = AudioStates(arguments.whisper), augmentation_of(arguments.noise, arguments.crowd)
    visual = None if arguments.avhubert is None else VideoStates(arguments.avhubert)
    for part, number in (("dev", 0), *(("train", number) for number in arguments.passes)):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
        rows = rows_of(arguments.manifest, part)
        for first in range(0, len(rows), SHARD):
            target = arguments.out / part / f"{number:02d}-{first // SHARD:03d}.safetensors"
            if target.exists():
                continue
            began, rng, some = time.process_time(), random.Random(f"{number}-{first}"), rows[first : first + SHARD]
            sounds = [read_audio(arguments.manifest.parent / row["audio_filepath"]) for row in some]
            if number:
                sounds = [augmentation.noisy(sound, rng) for sound in sounds]
            streams = {"audio": encoder.encode(sounds)}
            if visual is not None:
                streams["video"] = [lips(visual, row, len(s), rng) for row, s in zip(some, sounds, strict=True)]
            save_states(target, streams, [row["text"] for row in some])
            print(
                f"{part}/{target.name}: {len(some)} recordings, {time.process_time() - began:.0f} s of CPU", flush=True
            )


if __name__ == "__main__":
    main()
