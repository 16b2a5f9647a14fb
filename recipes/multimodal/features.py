"""Data of multimodal-tiny: native tokens of pictures, clips and recordings on disk, and questions about them.

    python recipes/multimodal/features.py OUT --cifar cifar10_train.npz --emoji EMOJI --fsdd fsdd.tar \
        --grid grid_s1.tar --backgrounds data/vqtoken/backgrounds

OUT/train, OUT/dev and OUT/test get `image.safetensors`, `video.safetensors`, `audio.safetensors` (native tokens of
every item, one after another, and how many each has) and `questions.jsonl`; OUT/tasks.json lists the answers.

| task | items | answers | parts |
| --- | --- | --- | --- |
| photo | CIFAR-10 photos, enlarged to 64 pixels | 10 classes | other photos |
| emoji | emoji of two artists on white | 9 groups of Unicode | other base characters |
| digit | single spoken digits (FSDD, 6 speakers) | 10 | the corpus's own: recordings 0-4 of a speaker test, 5-9 dev |
| color, letter | commands of one GRID speaker | 4 and 25 | other sentences |
| way, what, paint | one colored shape or letter that moves over a real clip (**synthetic**) | 5, 8, 6 | other films |

EMOJI holds `twitter/*.png`, `google/*.png` and `emoji.json` (npm: emoji-datasource-twitter, -google 16.0.0).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tokenthrift.prefixes import Prefix, load_prefix
from tokenthrift.vqtoken.synthetic.questions import COLORS, SHAPES, Scene, Shape
from tokenthrift.vqtoken.synthetic.scenes import draw, read_backgrounds, window

PARTS = ("train", "dev", "test")
GROUPS = {
    "Smileys & Emotion": "face",
    "People & Body": "person",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "game",
    "Objects": "object",
    "Symbols": "symbol",
    "Flags": "flag",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
QUESTIONS = {
    "photo": "what is in the picture?",
    "emoji": "which kind of emoji is it?",
    "digit": "which digit is said?",
    "color": "which color is said?",
    "letter": "which letter is said?",
    "way": "which way does it move?",
    "what": "what is moving?",
    "paint": "which color moves?",
}
Row = tuple[Any, list[tuple[str, str]]]
"""An item as its encoder takes it, and (task, answer) pairs."""


def pixels(image: Image.Image) -> Tensor:
    """(3, 64, 64) in [0, 1]."""
    image = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def photos(path: Path, part: str, count: int) -> Iterator[Row]:
    """CIFAR-10 photos; the last 4,000 of its training split are dev and test, as for KARL itself."""
    data = np.load(path)
    first = {"train": 0, "dev": 46_000, "test": 48_000}[part]
    for i in range(first, first + count):
        jpeg = data["jpeg"][data["offset"][i] : data["offset"][i + 1]].tobytes()
        name = str(data["names"][data["label"][i]])
        yield pixels(Image.open(io.BytesIO(jpeg))), [("photo", {"automobile": "car"}.get(name, name))]


def emoji(folder: Path, part: str, count: int) -> Iterator[Row]:
    """Emoji of a part, by a hash of the base character; skin tones and genders are left out as near copies."""
    found = []
    for row in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        number = int(hashlib.sha256(row["unified"].split("-")[0].encode()).hexdigest(), 16) % 10
        if row["category"] in GROUPS and {0: "test", 1: "dev"}.get(number, "train") == part:
            for artist in ("twitter", "google"):
                file = folder / artist / row["image"]
                if file.exists():
                    found.append((file, GROUPS[row["category"]]))
    random.Random(part).shuffle(found)
    for file, group in found[:count]:
        drawn = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        yield pixels(Image.alpha_composite(white, drawn)), [("emoji", group)]


def digits(path: Path, part: str) -> Iterator[Row]:
    """Spoken digits at 16 kHz."""
    from tokenthrift.media.audio import read_audio

    with tarfile.open(path) as tar:
        for member in tar:
            digit, _, index = Path(member.name).stem.split("_")
            if part != ("test" if int(index) < 5 else "dev" if int(index) < 10 else "train"):
                continue
            scratch = Path("/tmp") / f"multimodal-{Path(member.name).name}"
            scratch.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
            yield read_audio(scratch), [("digit", DIGITS[int(digit)])]
            scratch.unlink()


def commands(path: Path, part: str) -> Iterator[Row]:
    """GRID sentences: their color and their letter."""
    from tokenthrift.media.audio import read_audio

    with tarfile.open(path) as tar:
        members = {Path(member.name).name: member for member in tar}
        manifest = tar.extractfile(members["manifest.jsonl"])
        for line in manifest.read().decode().splitlines():  # type: ignore[union-attr]
            row = json.loads(line)
            if row["split"] != part:
                continue
            name = Path(row.get("video_filepath") or row["audio_filepath"]).name
            scratch = Path("/tmp") / f"multimodal-{name}"
            scratch.write_bytes(tar.extractfile(members[name]).read())  # type: ignore[union-attr]
            words = row["text"].split()
            yield read_audio(scratch), [("color", words[1]), ("letter", words[3])]
            scratch.unlink()


def moving(folder: Path, part: str, count: int) -> Iterator[Row]:
    """Clips of one shape that moves over a real film; **synthetic**."""
    clips, rng = read_backgrounds(folder / part), random.Random(part)
    for _ in range(count):
        way, color, name = rng.choice(list(WAYS)), rng.choice(COLORS), rng.choice(SHAPES)
        size = rng.randint(14, 20)
        low, high = size / 2, 64 - size / 2
        far = rng.uniform(0.5, 0.95) * (high - low)
        goes = [far * step for step in WAYS[way]]
        start = [rng.uniform(max(low, low - go), min(high, high - go)) for go in goes]
        stop = [a + go for a, go in zip(start, goes, strict=True)]
        shape = Shape(color, name, size, way, (start[0], start[1]), (stop[0], stop[1]), 0, 8)
        frames = draw(Scene((shape,), 8, 64), window(clips, rng, 8, 64))
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        yield clip, [("way", way), ("what", name), ("paint", color)]


def write(out: Path, kind: str, prefix: Prefix, rows: Iterable[Row], questions: list[dict[str, Any]]) -> None:
    """Encodes items of a kind and writes their tokens, unless an earlier run did; adds their questions."""
    file, lengths, parts, waiting = out / f"{kind}.safetensors", [], [], []
    done = file.exists()

    def encode() -> None:
        if waiting:
            tokens = prefix.encode(waiting)
            lengths.extend(tokens.mask.sum(1).tolist())
            parts.extend(item.half() for item in tokens.items())
            waiting.clear()

    for i, (item, pairs) in enumerate(rows):
        if not done:
            waiting.append(item)
        if len(waiting) == 16:
            encode()
        questions += [
            {"kind": kind, "item": i, "task": task, "question": QUESTIONS[task], "answer": answer}
            for task, answer in pairs
        ]
    if done:
        return
    encode()
    scratch = out / f"{kind}.part"  # a run that was stopped leaves no half of a file under its name
    save_file({"embeddings": torch.cat(parts), "lengths": torch.tensor(lengths)}, scratch)
    scratch.rename(file)
    print(f"{out.name}/{kind}: {len(lengths)} items, {sum(lengths)} tokens", flush=True)


def main() -> None:
    """Writes all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("cifar", "emoji", "fsdd", "grid", "backgrounds"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--image", default="model_cards/karl-tiny-64", help="(default: %(default)s)")
    parser.add_argument("--video", default="model_cards/vqtoken-tiny", help="(default: %(default)s)")
    parser.add_argument("--audio", default="model_cards/mtsk-tiny-en", help="(default: %(default)s)")
    parser.add_argument("--photos", type=int, default=6000, help="for training (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=1500, help="for training (default: %(default)s)")
    arguments = parser.parse_args()
    prefixes = {kind: load_prefix(getattr(arguments, kind)) for kind in ("image", "audio", "video")}
    answers: dict[str, set[str]] = {}
    for part in ("dev", "test", "train"):
        out = arguments.out / part
        if (out / "questions.jsonl").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        few = part != "train"
        items: dict[str, list[Iterable[Row]]] = {
            "image": [
                photos(arguments.cifar, part, 300 if few else arguments.photos),
                emoji(arguments.emoji, part, 200 if few else 4000),
            ],
            "audio": [digits(arguments.fsdd, part), commands(arguments.grid, part)],
            "video": [moving(arguments.backgrounds, part, 200 if few else arguments.clips)],
        }
        questions: list[dict[str, Any]] = []
        for kind, sources in items.items():
            write(out, kind, prefixes[kind], (row for source in sources for row in source), questions)
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (out / "questions.jsonl").write_text(text, encoding="utf-8")
    for part in PARTS:
        for line in (arguments.out / part / "questions.jsonl").read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            answers.setdefault(question["task"], set()).add(question["answer"])
    tasks = {task: sorted(words) for task, words in sorted(answers.items())}
    (arguments.out / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
