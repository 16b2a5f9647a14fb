"""Encoder states of real speech: `python speech_states.py MANIFEST OUT --noise DIR`.

As `states.py`, for a manifest whose lines have a `split` and no pictures. Pass 0 over the training recordings is clean;
in each further one a recording gets a room by chance and noise at -5 to 20 dB or, one time in seven, none, half of it a
crowd (`crowd.py`); with `--speeds` it is played at one of them (Ko et al. 2015; not where `rendered_lips.py` adds lips,
which move at one speed). With `--trailing-silence` Whisper reads silence after each, as a model with that setting does.
Development recordings stay as they are. Recordings of more than 30 s are left out.
With `--synthetic` each pass goes on with synthetic speech, whose sentences have far more words than some hours of
recordings. What is there is skipped, so a stopped run goes on.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from states import AudioStates, augmentation_of, options, save_states
from torch import Tensor

from tokenthrift.media.audio import read_audio
from tokenthrift.whisper import SAMPLE_RATE

SHARD = 400  # recordings
SECONDS = 30.0  # one pass of the encoder


def rows_of(manifest: Path, split: str) -> list[dict[str, Any]]:
    """The lines of a split whose recordings the encoder reads in one pass."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row.get("split") == split and row["duration"] < SECONDS]


def at_speed(sound: Tensor, speed: float) -> Tensor:
    """A recording (n,) played so many times as fast, unless it gets too long for one pass of the encoder."""
    if speed == 1 or len(sound) / speed > SECONDS * SAMPLE_RATE:
        return sound
    played: Tensor = torchaudio.functional.speed(sound, SAMPLE_RATE, speed)[0]
    return played


def spoken(shard: Path) -> list[tuple[Tensor, str]]:
    """The training clips of a shard of speech that one pass of the encoder reads, and their texts."""
    with np.load(shard) as data:
        audio, offset, rows = torch.from_numpy(data["audio"]), data["offset"], json.loads(str(data["rows"]))
    clips = zip(rows, offset, offset[1:], strict=False)
    kept = [(row, a, b) for row, a, b in clips if row["split"] == "train" and b - a < SECONDS * SAMPLE_RATE]
    if not (found := [(audio[a:b].float() / 32768, row["text"]) for row, a, b in kept]):
        raise SystemExit(f"{shard} has no clips for training")
    return found


def main() -> None:
    parser = options(__doc__, "manifest", lips=False)
    parser.add_argument("--crowd", type=Path, help="a crowd's noise, half of all noise")
    parser.add_argument("--synthetic", type=Path, help="folder of shards of recipes/dllm_asr/synthesise.py")
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 1], help="numbers of passes; 0 is clean")
    parser.add_argument("--trailing-silence", type=float, default=0.0, help="seconds, as of the model's configuration")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0], help="of passes that are not clean")
    arguments = parser.parse_args()
    if min(arguments.speeds) <= 0:
        parser.error("--speeds must be above 0")
    # What is there is skipped, so it must have been made in the same way.
    settings = {"trailing_silence": arguments.trailing_silence, "speeds": sorted(arguments.speeds)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = arguments.out / "settings.json"
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8"))) != settings:
        parser.error(f"{arguments.out} was begun with {found}, not with {settings}; take another OUT")
    kept.write_text(json.dumps(settings), encoding="utf-8")
    torch.set_num_threads(1)
    encoder, augmentation = AudioStates(arguments.whisper), augmentation_of(arguments.noise, arguments.crowd)
    synthetic = sorted(arguments.synthetic.glob("*.npz")) if arguments.synthetic else []
    for part, number in (("dev", 0), *(("train", number) for number in arguments.passes)):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
        rows = rows_of(arguments.manifest, part)
        chunks = [rows[first : first + SHARD] for first in range(0, len(rows), SHARD)]
        sources: list[tuple[str, list[dict[str, Any]] | Path]] = [(f"{k:03d}", some) for k, some in enumerate(chunks)]
        # Behind the recordings, in each pass, as passes are over the same texts.
        sources += [(f"s{shard.stem}", shard) for shard in synthetic if part == "train"]
        for name, source in sources:
            target = arguments.out / part / f"{number:02d}-{name}.safetensors"
            if target.exists():
                continue
            began, rng = time.process_time(), random.Random(f"{number}-{name}")
            if isinstance(source, Path):
                clips = spoken(source)
                sounds, texts = [sound for sound, _ in clips], [text for _, text in clips]
            else:
                sounds = [read_audio(arguments.manifest.parent / row["audio_filepath"]) for row in source]
                texts = [row["text"] for row in source]
            if number:
                of_speed = random.Random(f"speed-{number}-{name}")
                sounds = [at_speed(sound, of_speed.choice(arguments.speeds)) for sound in sounds]
                sounds = [augmentation.noisy(sound, rng) for sound in sounds]
            states = encoder.encode(sounds, arguments.trailing_silence)
            save_states(target, {"audio": states}, texts, arguments.trailing_silence)
            print(f"{part}/{target.name}: {len(texts)} clips, {time.process_time() - began:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
