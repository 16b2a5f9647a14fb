"""A KARL model beside JPEG, WebP and AVIF at equal bytes, and a gallery of what more tokens show.

Writes `report.md` with a table for each set, `rate_distortion.png`, and `gallery.png`: originals beside reconstructions
from 4, 8, 16 ... tokens.

    python recipes/karl/rate_distortion.py model_cards/karl-tiny-64 --data photos=data/karl/photos_test.npy \
        emoji=data/karl/emoji_test.npy --images 300 --out report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from tokenthrift.evaluation.report import write_report
from tokenthrift.karl import Karl
from tokenthrift.karl.evaluation.image_sets import named_source, read_set
from tokenthrift.karl.evaluation.plots import gallery, rate_distortion
from tokenthrift.karl.evaluation.rate_distortion import Point, format_points, karl_points, rate_table
from tokenthrift.karl.evaluation.sweeps import at_counts, prepare

SHOWN = 6  # images of each set in the gallery


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--data", nargs="+", required=True, help="NAME=SOURCE: folder, .npy, .npz or .jsonl manifest")
    parser.add_argument("--images", type=int, default=300, help="of each set (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of which images are taken (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    options = parser.parse_args()
    karl = Karl.from_pretrained(options.model)
    native = karl.config.max_tokens
    counts = [count for count in (4, 8, 16, 32, 64, 128, 256) if count <= native]
    points: dict[str, list[Point]] = {}
    shown: list[Tensor] = []
    with torch.inference_mode():
        for name, source in map(named_source, options.data):
            images = read_set(source, karl.config.size[0], options.images, options.seed)
            points[name] = [*karl_points(karl, images, counts), *format_points(images)]
            (some,) = prepare(karl, images[:SHOWN], SHOWN)
            shown.append(torch.stack([some.images, *at_counts(karl, some, counts)], 1))
    write_report(
        options.out,
        title=f"KARL beside image formats: {options.model.name}",
        settings={"model": str(options.model), "images": options.images, "command": " ".join(["python", *sys.argv])},
        tables=[rate_table(name, found) for name, found in points.items()],
        figures={"rate_distortion": rate_distortion(points), "gallery": gallery(torch.cat(shown), counts)},
        notes=["The bytes of a file are all of them: headers, tables and checksums too."],
    )
    print(options.out / "report.md")


if __name__ == "__main__":
    main()
