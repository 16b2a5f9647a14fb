"""Real voices with rendered lips: `python rendered.py ALIGNED.jsonl OUT`.

There are far more real recordings than real talking faces that can be had freely. `align.py` says when each phoneme of
a recording is said, and the mouth of `mouth.py` is moved by these times, with a face for each speaker. `OUT` gets a
lossless video for each recording and a `manifest.jsonl` whose lines say `"lips": "rendered"`; the sound stays where it
is. A figure made of it is one of "real voice, rendered lips", never of lip reading. What is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from pathlib import Path
from typing import Any

from talk import pictures, write_video
from torch import Tensor

from tokenthrift.media.audio import read_audio


def face_number(row: dict[str, Any], seed: int) -> int:
    """Whose face says a recording: that of its speaker, or one of its own."""
    return zlib.crc32(str(row.get("speaker", seed)).encode())


def mouth(row: dict[str, Any], samples: int, seed: int, size: int = 96) -> Tensor:
    """`(frames, size, size)` uint8 pictures of who says an aligned recording of so many samples at 16 kHz.

    Args:
        row: its line, with `phonemes` and, if known, `speaker`.
        samples: of the recording.
        seed: of what differs from clip to clip.
        size: side of the picture.
    """
    return pictures({"phonemes": row["phonemes"], "speaker": face_number(row, seed), "seed": seed}, samples, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="of align.py, without --letters unless letters are named in it")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    home, lines = arguments.manifest.parent, []
    for number, line in enumerate(arguments.manifest.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        sound = home / row["audio_filepath"]
        video = arguments.out / f"{number:06d}.mkv"
        if not video.exists():
            partial = video.with_suffix(".partial.mkv")
            write_video(partial, mouth(row, len(read_audio(sound)), number))
            os.replace(partial, video)
        row |= {"audio_filepath": os.path.relpath(sound.resolve(), arguments.out.resolve())}
        lines.append(json.dumps(row | {"video_filepath": video.name, "lips": "rendered"}) + "\n")
    (arguments.out / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} recordings with rendered lips")


if __name__ == "__main__":
    main()
