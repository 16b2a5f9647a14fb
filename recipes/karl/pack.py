"""Photos and emoji as arrays that training maps into memory: `photos_train.npy`, `emoji_test.npy` and so on.

Each file is uint8 `(N, 3, size, size)`. Photos are CIFAR-10's training split (32 px, enlarged); the last 4,000 of its
50,000 are kept out of training, as that split comes in random order. Emoji are composited on white and split by base
character, because skin tones, genders and joined sequences of one character are near copies: no base character is in
two parts. Of the held-out ones only the first drawing of each artist is kept, so that no character counts forty times.
Training photos are enlarged by filters drawn at random, since nobody can know how later users enlarge theirs.

    python recipes/karl/pack.py --cifar cifar10_train.npz --emoji emoji --out data/karl
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOS = {"train": range(46_000), "dev": range(46_000, 48_000), "test": range(48_000, 50_000)}
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
PEOPLE = ("1f468", "1f469", "1f9d1")  # man, woman, person: their professions are one drawing in other clothes


def base_character(name: str) -> str:
    """The character that an emoji's file name starts with; flags are pairs of letters, people are all one."""
    points = name.lower().split("-")
    if points[0] in PEOPLE:
        return "people"
    flag = 0x1F1E6 <= int(points[0], 16) <= 0x1F1FF
    return "-".join(points[:2]) if flag else points[0]


def part_of(base: str) -> str:
    """`train`, `dev` (one in ten) or `test` (one in ten), by a hash of the base character."""
    if base == "people":
        return "train"
    return {0: "test", 1: "dev"}.get(int(hashlib.sha256(base.encode()).hexdigest(), 16) % 10, "train")


def photos(path: Path, part: str, size: int) -> Iterable[Image.Image]:
    """Photos of one part, enlarged: bicubic, or in training half of them by another filter."""
    data = np.load(path)
    jpeg, offset = data["jpeg"], data["offset"]
    rng = np.random.default_rng(0)
    for index in PHOTOS[part]:
        image = Image.open(io.BytesIO(jpeg[offset[index] : offset[index + 1]].tobytes())).convert("RGB")
        kind = FILTERS[rng.choice(3, p=(0.5, 0.25, 0.25))] if part == "train" else FILTERS[0]
        yield image.resize((size, size), kind)


def emoji(folder: Path, part: str, size: int) -> Iterable[Image.Image]:
    """Emoji of one part, on white."""
    seen = set()
    for path in sorted(folder.rglob("*.png")):
        base = base_character(path.stem)
        if part_of(base) != part or (part != "train" and (path.parent, base) in seen):
            continue
        seen.add((path.parent, base))
        drawing = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", drawing.size, "white")
        yield Image.alpha_composite(white, drawing).convert("RGB").resize((size, size), FILTERS[0])


def write(path: Path, images: Iterable[Image.Image]) -> None:
    """Writes images `(N, 3, size, size)` uint8, complete or not at all."""
    array: Any = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    partial.replace(path)
    print(f"{path}: {len(array)} images")


def main() -> None:
    """Packs both sets into three parts each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="npz with `jpeg` bytes and `offset`")
    parser.add_argument("--emoji", type=Path, required=True, help="folder of PNG files, one folder per artist")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for part in PHOTOS:
        write(options.out / f"emoji_{part}.npy", emoji(options.emoji, part, options.size))
        write(options.out / f"photos_{part}.npy", photos(options.cifar, part, options.size))


if __name__ == "__main__":
    main()
