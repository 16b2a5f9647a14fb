"""Writes or checks SHA256SUMS of each model card: every file of the folder but itself, the card and hidden ones.

    python .ci/hashes.py            writes model_cards/*/SHA256SUMS
    python .ci/hashes.py --check    says which are stale, exit code 1

A user checks a download by `sha256sum --check SHA256SUMS` in its folder. The card itself is left out: it may be
corrected without the model being another one.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

CARDS = Path(__file__).resolve().parents[1] / "model_cards"
LEFT_OUT = ("README.md", "SHA256SUMS")


def lines(folder: Path) -> str:
    """The text of a folder's SHA256SUMS."""
    files = sorted(path for path in folder.iterdir() if path.name not in LEFT_OUT and not path.name.startswith("."))
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def main(arguments: list[str]) -> int:
    """Returns 1 if a file is stale and only checked."""
    stale = []
    for folder in sorted(path.parent for path in CARDS.glob("*/config.json")):
        sums = folder / "SHA256SUMS"
        wanted = lines(folder)
        if not sums.is_file() or sums.read_text(encoding="utf-8") != wanted:
            stale.append(str(sums.relative_to(CARDS.parent)))
            if "--check" not in arguments:
                sums.write_text(wanted, encoding="utf-8")
    print("\n".join(stale) or "all hashes hold")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
