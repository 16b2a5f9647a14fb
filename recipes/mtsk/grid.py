"""A manifest of GRID clips from their names: `python grid.py CLIPS OUT`. Real faces and voices, for tests only.

A name spells its sentence: `bbaf2n` is "bin blue at f two now" (Cooke et al. 2006). The clips stay where they are; lips
are cropped when the manifest is read.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from phrases import GRID

from tokenthrift.media.video import probe


def sentence(name: str) -> str:
    """The six words of a clip's name; z is zero.

    Raises:
        ValueError: the name spells none.
    """
    words = []
    for letter, slot in zip(name, GRID, strict=True):
        digit = {"z": "zero", **dict(zip("123456789", GRID[4][1:], strict=True))}
        found = [digit[letter]] if slot is GRID[4] and letter in digit else [w for w in slot if w[0] == letter]
        if slot is GRID[3]:
            found = [letter] if letter in slot else []
        if len(found) != 1:
            raise ValueError(f"{name!r} is no name of a GRID clip: {letter!r} is none of {slot}")
        words += found
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder of *.mpg")
    parser.add_argument("out", type=Path, help="folder of the manifest")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in sorted(arguments.clips.glob("*.mpg")):
        path = os.path.relpath(clip.resolve(), arguments.out.resolve())
        row = {"audio_filepath": path, "video_filepath": path, "text": sentence(clip.stem)}
        lines.append(json.dumps({**row, "duration": round(probe(clip).seconds, 3)}) + "\n")
    (arguments.out / "manifest.jsonl").write_text("".join(lines))
    print(f"{len(lines)} clips")


if __name__ == "__main__":
    main()
