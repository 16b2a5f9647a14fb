"""Keeps more speakers back for development: `python hold_out.py MANIFEST OUT --source NAME --speakers A B`.

The development split of a manifest may be of short sentences while the test is of books. OUT, beside MANIFEST, has its
lines, those of the named speakers, and of every so many of one source in alphabetical order, moved from training to
development.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out", type=Path, help="in the folder of MANIFEST, as paths of recordings are relative to it")
    parser.add_argument("--source", help="every so many of its speakers are kept back")
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--speakers", nargs="*", default=[], help="these are kept back too")
    arguments = parser.parse_args()
    if arguments.out.parent.resolve() != arguments.manifest.parent.resolve():
        parser.error("OUT must be in the folder of MANIFEST, as paths of recordings are relative to it")
    rows = [json.loads(line) for line in arguments.manifest.read_text(encoding="utf-8").splitlines()]
    training = [row for row in rows if row["split"] == "train"]
    own: list[str] = []
    if arguments.source is not None:
        own = sorted({row["speaker"] for row in training if row.get("source") == arguments.source})
        if not own or arguments.every < 1:
            parser.error(f"every {arguments.every} of {len(own)} speakers of {arguments.source} are nobody")
    if unknown := set(arguments.speakers) - {row["speaker"] for row in training}:
        parser.error(f"no speaker of training is named {', '.join(sorted(unknown))}")
    held = {*arguments.speakers, *own[:: arguments.every]}
    moved = [row for row in training if row["speaker"] in held]
    for row in moved:
        row["split"] = "dev"
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(moved)} recordings of {len(held)} speakers, {sum(row['duration'] for row in moved) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
