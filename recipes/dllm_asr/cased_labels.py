"""What Whisper base writes of training recordings: `python cased_labels.py SPEECH OUT.jsonl --whisper FOLDER`.

The transcripts of speech corpora have neither capitals nor punctuation. Whisper's have both, so they say which casing
and which mark a word has where both wrote the same word; `punctuation.py` aligns them and trains the head. This script
only transcribes: a random choice of the clips of the shards that `recordings.py` wrote, each line `id`, `shard`, `row`,
`text` (the reference) and `cased` (Whisper's). It appends, so a run that is stopped goes on where it was.

Whisper runs through faster-whisper in int8, greedy, without timestamps. FOLDER is a model in CTranslate2's format, or a
name that faster-whisper knows ("base").
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Clip(NamedTuple):
    """Where a recording stands."""

    id: str
    shard: Path
    row: int
    text: str


def chosen(speech: Path, clips: int, first_shard: int, seed: int) -> list[Clip]:
    """A random choice of clips in the order they are transcribed; a longer choice begins with a shorter one."""
    found: list[Clip] = []
    for shard in sorted(speech.glob("*.npz")):
        if int(shard.name.partition("-")[0]) < first_shard:
            continue
        with np.load(shard) as file:
            rows = json.loads(str(file["rows"]))
        found += [Clip(row["id"], shard, i, row["text"]) for i, row in enumerate(rows)]
    random.Random(seed).shuffle(found)
    return found[:clips]


def transcripts(clips: list[Clip], whisper: str, threads: int) -> Iterator[tuple[Clip, str]]:
    """Whisper's text of each clip."""
    from faster_whisper import WhisperModel

    model = WhisperModel(whisper, device="cpu", compute_type="int8", cpu_threads=threads)
    shard, audio, offset = None, np.empty(0), np.empty(0)
    for clip in clips:
        if clip.shard != shard:
            with np.load(clip.shard) as file:
                shard, audio, offset = clip.shard, file["audio"], file["offset"]
        samples = audio[offset[clip.row] : offset[clip.row + 1]].astype(np.float32) / 32_768
        segments, _ = model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        yield clip, " ".join(segment.text.strip() for segment in segments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="folder of shards, by recordings.py")
    parser.add_argument("out", type=Path, help="file to append to")
    parser.add_argument("--whisper", default="base", help="folder or name of a faster-whisper model")
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--portion", type=int, help="transcribe at most so many now")
    parser.add_argument("--first-shard", type=int, default=9100, help="lowest number of a shard to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.touch()
    done = {json.loads(line)["id"] for line in arguments.out.read_text(encoding="utf-8").splitlines()}
    clips = chosen(arguments.speech, arguments.clips, arguments.first_shard, arguments.seed)
    # Those of one shard side by side, so that a shard is read once a portion.
    left = sorted([c for c in clips if c.id not in done][: arguments.portion], key=lambda c: (c.shard.name, c.row))
    with arguments.out.open("a", encoding="utf-8") as file:
        for clip, cased in transcripts(left, arguments.whisper, arguments.threads):
            row = {"id": clip.id, "shard": clip.shard.name, "row": clip.row, "text": clip.text, "cased": cased}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{arguments.out}: {len(done) + len(left)} of {len(clips)} clips")


if __name__ == "__main__":
    main()
