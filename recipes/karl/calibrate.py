"""Calibrates a KARL model on images that it was not trained on, and keeps the result in its folder.

Give sources in the mixture that the model will meet; as many images of each are taken. Target errors that will be used
can be named, so that near them no tokens are spent on staying further below than is needed.

    python recipes/karl/calibrate.py model_cards/karl-tiny-64 data/karl/photos_dev.npy data/karl/emoji_dev.npy \
        --targets 0.1 0.12

With `--test` it prints how many of other images then miss each target; with `--dry-run` the folder stays as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tokenthrift.budget import BudgetError
from tokenthrift.config import to_plain
from tokenthrift.evaluation.statistics import bootstrap_interval
from tokenthrift.karl import Karl
from tokenthrift.karl.calibration import Calibration
from tokenthrift.karl.evaluation.image_sets import read_set
from tokenthrift.karl.evaluation.sweeps import calibrate, sweep


def main() -> None:
    """Adds `calibration` to the model's config.json; weights and other files stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("sources", type=Path, nargs="+", help="folder, .npy, .npz or .jsonl manifest")
    parser.add_argument("--alpha", type=float, default=0.1, help="share that may miss (default: %(default)s)")
    parser.add_argument("--targets", type=float, nargs="*", default=[], help="target errors that will be used")
    parser.add_argument("--seed", type=int, default=0, help="of which images are taken (default: 0)")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="other images, to count misses of the targets")
    parser.add_argument("--dry-run", action="store_true", help="leave the model as it is")
    options = parser.parse_args()
    if options.test and not options.targets:
        parser.error("--test counts misses of --targets, and there are none")
    karl = Karl.from_pretrained(options.model)
    sets = [read_set(source, karl.config.size[0], None, options.seed) for source in options.sources]
    count = min(map(len, sets))
    images = torch.cat([images[:count] for images in sets])
    calibration = calibrate(karl, images, options.alpha, options.targets)
    for request, bound in zip(calibration.requests, calibration.bounds, strict=True):
        print(f"conditioned on {request:g}, all but {options.alpha:.0%} stay within {bound:.4f}")
    if not options.dry_run:
        write(options.model, calibration)
    for source in options.test:
        images = read_set(source, karl.config.size[0])
        for target in options.targets:
            print(f"{source.stem}: {misses(karl, images, calibration, target)}")


def write(folder: Path, calibration: Calibration) -> None:
    """Keeps a calibration in the configuration of a model folder."""
    path = folder / "config.json"
    partial = path.with_suffix(".partial")
    fields = {**json.loads(path.read_text(encoding="utf-8")), "calibration": to_plain(calibration)}
    partial.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def misses(karl: Karl, images: torch.Tensor, calibration: Calibration, target: float) -> str:
    """How many of some images exceed a target error, encoded as a calibration says."""
    try:
        request = calibration.request(target)
    except BudgetError as error:
        return str(error)
    used, achieved, _ = sweep(karl, images, errors=(request,))
    share, low, high = bootstrap_interval((achieved[:, 0] > target).double().tolist())
    return (
        f"{share:.1%} of {len(images)} images miss {target:g} (95 % {low:.1%} to {high:.1%}), "
        f"with {used.double().mean():.1f} tokens"
    )


if __name__ == "__main__":
    main()
