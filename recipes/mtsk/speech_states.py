"""Encoder states of real speech, sound alone: `python speech_states.py MANIFEST OUT --noise DIR`.

As `states.py`, for a manifest whose lines have a `split` and no pictures. The first pass over the training recordings
is clean; in each further one a recording gets a room by chance and noise at -5 to 20 dB or none, half of it a crowd
(`crowd.py`). Development recordings stay as they are. Recordings of more than 30 s are left out. What is there is
skipped, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from states import AudioStates, augmentation_of, save_states

from tokenthrift.media.audio import read_audio

SHARD = 400  # recordings
SECONDS = 30.0  # one pass of the encoder


def rows_of(manifest: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a split whose recordings the encoder reads in one pass."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.get("split") == split and row["duration"] < SECONDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--whisper", default="openai/whisper-tiny.en")
    parser.add_argument("--noise", nargs="+", default=[], help="folders of noise*.flac and rir*.flac")
    parser.add_argument("--crowd", type=Path, help="a crowd's noise, half of all noise")
    parser.add_argument("--passes", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    encoder, augmentation = AudioStates(arguments.whisper), augmentation_of(arguments.noise, arguments.crowd)
    for part, number in (("dev", 0), *(("train", number) for number in range(arguments.passes))):
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
            save_states(target, {"audio": encoder.encode(sounds)}, [row["text"] for row in some])
            print(
                f"{part}/{target.name}: {len(some)} recordings, {time.process_time() - began:.0f} s of CPU", flush=True
            )


if __name__ == "__main__":
    main()
