"""Talking-face video to mouth crops, once: `python crop.py MANIFEST OUT`.

Finding faces takes longer than training on them, so a corpus is cropped before. `OUT` gets a lossless video of 96 x 96
grey pixels at 25 frames a second for each clip, its sound as 16 kHz FLAC, and a `manifest.jsonl` like the one given. A
clip without a face, or one that cannot be read, is left out and named; what is there is skipped, so a stopped run goes
on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import soundfile
from talk import write_video

from tokenthrift.media.audio import AudioError, read_audio
from tokenthrift.media.video import VideoError
from tokenthrift.mtsk.audiovisual.lips import FaceError, read_lips


def crop(row: dict[str, Any], home: Path, out: Path, name: str) -> dict[str, Any]:
    """The line of the new manifest for one of the old."""
    done = {key: value for key, value in row.items() if not key.endswith("_filepath")}
    if row.get("video_filepath"):
        target = out / f"{name}.mkv"
        if not target.exists():
            partial = target.with_suffix(".partial.mkv")
            write_video(partial, read_lips(home / row["video_filepath"]).pixels)
            os.replace(partial, target)
        done["video_filepath"] = target.name
    if row.get("audio_filepath"):
        soundfile.write(out / f"{name}.flac", read_audio(home / row["audio_filepath"]).numpy(), 16_000)
        done["audio_filepath"] = f"{name}.flac"
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = []
    lines = arguments.manifest.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            kept.append(crop(json.loads(line), arguments.manifest.parent, arguments.out, f"{number:06d}"))
        except (FaceError, VideoError, AudioError) as error:
            print(error, file=sys.stderr)
    (arguments.out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    print(f"{len(kept)} of {len(lines)} clips")


if __name__ == "__main__":
    main()
