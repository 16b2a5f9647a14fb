"""A small visual encoder of AV-HuBERT's shape, taught on real faces: `python real_lips.py ALIGNED.jsonl OUT`.

`ALIGNED.jsonl` comes from `align.py`: mouth crops, and when each word and phoneme is said. The encoder learns to name
the word and the phoneme of every frame (cross entropy), which needs far fewer clips than a loss over whole sentences
(Wand, Koutnik and Schmidhuber 2016, arXiv 1601.08188, read single words of GRID so). A training clip is cut to its
speech, often continued by another one at the border of a word, played up to 15 % slower or faster, mirrored, moved,
zoomed, brightened and masked in time. `OUT/avhubert.safetensors` has the key names of the public checkpoints and holds
the running mean of the weights; the slopes of its PReLU stay at 0.25, since to learn them doubles the time of a step.

Every few steps `OUT/metrics.csv` and TensorBoard get the losses and the word errors of the lines of split `dev`, read
by the grammar of GRID. A checkpoint is kept; a stopped run goes on. Crops are averaged over squares of 2 pixels, so a
model around this encoder is assembled with `video_shrink: 2`.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lip_encoder import CROP, SHRINK, options, save_encoder, save_run
from phrases import GRID
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter

from tokenthrift.evaluation.wer import word_errors
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert, normalize
from tokenthrift.mtsk.audiovisual.lips import read_lips
from tokenthrift.mtsk.training.augmentation import mask_video

FPS = 25
LEAD = 0.04  # seconds by which the lips are ahead of the sound
MARGIN = 5  # frames kept before and after the speech


class _Slope(nn.PReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.25)


def with_fixed_slopes(encoder: AvHubert) -> AvHubert:
    """The encoder with slopes of its PReLU that do not learn."""
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.PReLU):
                setattr(module, name, _Slope(child.num_parameters))
    return encoder


class Teacher(nn.Module):
    """The encoder and two linear readings of its states."""

    def __init__(self, words: int, phonemes: int, width: int, layers: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.encoder = with_fixed_slopes(AvHubert(width, layers, width // 64, 4 * width, channels))
        self.encoder.feature_extractor_audio.requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.words, self.phonemes = nn.Linear(width, words), nn.Linear(width, phonemes)

    def forward(self, video: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        states = self.drop(self.encoder(video, lengths))
        return self.words(states), self.phonemes(states)


class Clips:
    """Aligned clips in memory: pictures (T, 96, 96), and of each frame the word and the phoneme.

    Args:
        manifest: of `align.py`.
        words: names of the classes of words, the first for none; None leaves the classes out.
        phonemes: the same of phonemes.
        split: whose lines are read.
    """

    def __init__(self, manifest: Path, words: list[str] | None, phonemes: list[str] | None, split: str) -> None:
        self.rows = [row for row in map(json.loads, manifest.read_text().splitlines()) if row["split"] == split]
        self.pictures, self.words, self.phonemes, self.borders = [], [], [], []
        for row in self.rows:
            pictures = read_lips(manifest.parent / row["video_filepath"]).pixels
            self.pictures.append(pictures)
            # The first frame of each word, and the frame after the last word.
            edges = [start for start, _, _ in row["words"]] + [row["words"][-1][1]]
            self.borders.append([min(len(pictures), max(0, round((edge - LEAD) * FPS))) for edge in edges])
            if words is None or phonemes is None:
                continue
            time_of = (np.arange(len(pictures)) + 0.5) / FPS + LEAD
            word = np.zeros(len(pictures), dtype=np.int64)
            for start, end, name in row["words"]:
                word[(time_of >= start) & (time_of < end)] = words.index(name)
            starts = np.array([start for start, _ in row["phonemes"]])
            names = np.array([phonemes.index(name) for _, name in row["phonemes"]])
            self.words.append(torch.from_numpy(word))
            place = np.maximum(np.searchsorted(starts, time_of, side="right") - 1, 0)
            self.phonemes.append(torch.from_numpy(names[place]))

    def spoken(self, index: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Words `first` to `last` of a clip, with some frames around where the clip begins or ends there."""
        border = self.borders[index]
        a = max(0, border[0] - MARGIN) if first == 0 else border[first]
        b = border[-1] + MARGIN if last == len(border) - 1 else border[last]
        return self.pictures[index][a:b], self.words[index][a:b], self.phonemes[index][a:b]

    def training_clip(self, index: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """A changed clip as the encoder reads it, and the word and phoneme of each frame."""
        size = len(self.borders[index]) - 1
        parts = [self.spoken(index, 0, size)]
        other = rng.randrange(len(self.rows))
        if rng.random() < 0.5 and len(self.borders[other]) - 1 == size:
            cut = rng.randrange(1, size)
            parts = [self.spoken(index, 0, cut), self.spoken(other, cut, size)]
        pictures, words, phonemes = (torch.cat(rows) for rows in zip(*parts, strict=True))
        count = round(len(pictures) * rng.uniform(0.85, 1.15))
        frames = torch.linspace(0, len(pictures) - 1, count).round().long()
        return change(pictures[frames], rng), words[frames], phonemes[frames]


def change(pictures: Tensor, rng: random.Random) -> Tensor:
    """(T, 96, 96) to (T, 44, 44): mask, mirror, move, zoom, brightness, contrast."""
    pictures = mask_video(pictures, rng, longest=6)
    side = rng.randrange(80, 97)
    top, left = rng.randrange(97 - side), rng.randrange(97 - side)
    part = pictures[:, None, top : top + side, left : left + side].float() / 255
    small = F.interpolate(part, size=CROP // SHRINK, mode="bilinear")[:, 0]
    if rng.random() < 0.5:
        small = small.flip(2)
    return ((small - 0.421) * rng.uniform(0.8, 1.25) + rng.uniform(-0.08, 0.08)) / 0.165


def read_grid(scores: Tensor, words: list[str]) -> str:
    """The likeliest six words of GRID's grammar, each as long as it likes, with silence at the ends.

    Args:
        scores: (T, words) log probabilities; word 0 is silence.
        words: their names.
    """
    slots = [[0], *([words.index(w) for w in slot if w in words] for slot in GRID), [0]]
    where = torch.tensor([i for slot in slots for i in slot])
    slot_of = torch.tensor([k for k, slot in enumerate(slots) for _ in slot])
    emitted = scores[:, where]
    best = torch.where(slot_of == 0, emitted[0], torch.tensor(-torch.inf))
    steps = []
    for row in emitted[1:]:
        tops = [best[slot_of == k].max(0) for k in range(len(slots))]
        firsts = [int((slot_of == k).nonzero()[0]) for k in range(len(slots))]
        entered = torch.stack([torch.tensor(-torch.inf), *(top.values for top in tops[:-1])])[slot_of]
        source = torch.tensor([0, *(a + int(top.indices) for a, top in zip(firsts, tops, strict=True))][:-1])[slot_of]
        own = torch.arange(len(where))
        steps.append(torch.where(entered > best, source, own))
        best = torch.maximum(entered, best) + row
    place = len(where) - 1
    found = [place]
    for back in reversed(steps):
        place = int(back[place])
        if place != found[-1]:
            found.append(place)
    return " ".join(words[int(where[i])] for i in reversed(found) if int(where[i]))


@torch.inference_mode()
def development(model: Teacher, clips: Clips, words: list[str]) -> tuple[float, float, list[tuple[str, str]]]:
    """Share of wrong words, share of right frames, and (truth, read) of each clip."""
    model.eval()
    pairs, right, total = [], 0, 0
    for row, pictures, word in zip(clips.rows, clips.pictures, clips.words, strict=True):
        scores, _ = model(normalize(pictures, CROP, SHRINK)[None], torch.tensor([len(pictures)]))
        right += int((scores[0].argmax(1) == word).sum())
        total += len(word)
        pairs.append((row["text"], read_grid(scores[0].log_softmax(1), words)))
    model.train()
    truth, texts = zip(*pairs, strict=True)
    return word_errors(truth, texts, str).rate, right / total, pairs


def rate_at(step: int, steps: int, rate: float) -> float:
    """Linear warm-up over 15 % of the steps, then a cosine to zero; of the step alone, so that a run may be cut."""
    warm = max(1, round(0.15 * steps))
    return rate * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def main() -> None:
    parser = options(__doc__, "manifest", 2800, 16)
    parser.add_argument("--width", type=int, default=192, help="of the encoder's states, a multiple of 64")
    parser.add_argument("--layers", type=int, default=3, help="of its transformer")
    parser.add_argument("--channels", type=int, nargs=4, default=[8, 16, 32, 64], help="of its convolutions")
    parser.add_argument("--every", type=int, default=200, help="steps between readings of the development clips")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [json.loads(line) for line in arguments.manifest.read_text().splitlines()]
    words = ["", *sorted({name for row in rows for _, _, name in row["words"]})]
    phonemes = sorted({name for row in rows for _, name in row["phonemes"]})
    train, dev = (Clips(arguments.manifest, words, phonemes, split) for split in ("train", "dev"))
    model = Teacher(len(words), len(phonemes), arguments.width, arguments.layers, arguments.channels)
    mean = copy.deepcopy(model).requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, arguments.rate, weight_decay=0.05)
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, done = arguments.out / "training.ckpt", 0
    parts = {"model": model, "mean": mean, "optimizer": optimizer}
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["step"]
    model.train()
    board = SummaryWriter(arguments.out)
    metrics = arguments.out / "metrics.csv"
    if not metrics.exists():
        metrics.write_text("step,loss,frames_right,dev_frames_right,dev_wer,cpu_seconds\n")
    began, losses, right = time.process_time(), 0.0, 0.0
    for step in range(done + 1, arguments.steps + 1):
        rng = random.Random(step)
        chosen = [train.training_clip(rng.randrange(len(train.rows)), rng) for _ in range(arguments.batch)]
        videos, word, phoneme = (list(column) for column in zip(*chosen, strict=True))
        lengths = torch.tensor([len(video) for video in videos])
        by_word, by_phoneme = model(pad_sequence(videos, True), lengths)
        target = pad_sequence(word, True, padding_value=-100)
        loss = F.cross_entropy(by_word.flatten(0, 1), target.flatten(), label_smoothing=0.1)
        sounds = pad_sequence(phoneme, True, padding_value=-100)
        loss = loss + 0.5 * F.cross_entropy(by_phoneme.flatten(0, 1), sounds.flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, arguments.steps, arguments.rate)
        optimizer.step()
        decay = min(0.995, step / (step + 20))
        with torch.no_grad():
            for own, new in zip(mean.state_dict().values(), model.state_dict().values(), strict=True):
                if own.is_floating_point():
                    own.lerp_(new, 1 - decay)
                else:
                    own.copy_(new)
        losses += loss.item()
        right += (by_word.argmax(2)[target >= 0] == target[target >= 0]).float().mean().item()
        if step % 50 == 0 or step == arguments.steps:
            save_run(kept, {name: part.state_dict() for name, part in parts.items()} | {"step": step})
            print(f"step {step}: loss {loss.item():.3f}, {time.process_time() - began:.0f} s of CPU", flush=True)
        if step % arguments.every == 0 or step == arguments.steps:
            wer, frames, pairs = development(mean, dev, words)
            values = {"loss": losses / arguments.every, "frames_right": right / arguments.every}
            values |= {"dev_frames_right": frames, "dev_wer": wer, "cpu_seconds": time.process_time() - began}
            losses = right = 0.0
            for name, value in values.items():
                board.add_scalar(name, value, step)
            board.add_text("read", "\n\n".join(f"{truth} -> {text}" for truth, text in pairs[:8]), step)
            board.flush()
            with metrics.open("a") as file:
                file.write(",".join([str(step), *(f"{value:.4f}" for value in values.values())]) + "\n")
            print(f"step {step}: {values}, {pairs[0][0]!r} read as {pairs[0][1]!r}", flush=True)
            save_encoder(mean.encoder, arguments.out)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # of the whole process, so not where tests import this
    main()
