"""What each reducer keeps: coverage of the native tokens, and of what is asked for, at equal counts.

    python benchmarks/reducers.py [--clips 20] [--seed 0]

**Synthetic** tokens: 8 frames of 8 x 8 cells, a still background of eight textures, and three things that move over it
cell by cell; the question is a noisy copy of one of the things' own direction. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.reducers import REDUCERS
from tokenthrift.reducers.query import QueryReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken

FRAMES, SIDE, WIDTH = 8, 8, 64
COUNTS = (16, 32, 64, 128)


def clip(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, WIDTH) tokens, (N,) which of them show what is asked for, and the question (3, WIDTH)."""
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    textures = torch.randn(8, WIDTH, generator=noise)
    cells = torch.tensor([rng.randrange(8) for _ in range(SIDE * SIDE)])
    frames = textures[cells].expand(FRAMES, -1, -1).clone()
    asked = torch.zeros(FRAMES, SIDE * SIDE, dtype=torch.bool)
    things = 1.5 * torch.randn(3, WIDTH, generator=noise)
    for number, thing in enumerate(things):
        row, column, step = rng.randrange(SIDE), rng.randrange(SIDE), rng.choice((-1, 1))
        for frame in range(FRAMES):
            cell = row * SIDE + (column + step * frame) % SIDE
            frames[frame, cell] = thing
            asked[frame, cell] = number == 0
    frames += 0.1 * torch.randn(frames.shape, generator=noise)
    words = torch.randn(3, WIDTH, generator=noise)
    words[1] = things[0] + 0.5 * torch.randn(WIDTH, generator=noise)
    return frames.flatten(0, 1), asked.flatten(), words


def measure(native: Tensor, kept: Tensor, asked: Tensor) -> tuple[float, float]:
    """Explained variance, and the share of what is asked for that is kept."""
    nearest = torch.cdist(native, kept).argmin(1)
    error = (native - kept[nearest]).square().sum()
    variance = 1 - float(error / (native - native.mean(0)).square().sum())
    alike = normalize(native[asked], dim=-1) @ normalize(kept, dim=-1).T
    return variance, float((alike.amax(1) > 0.9).float().mean())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    reducers = {name: make() for name, make in REDUCERS.items()} | {"VQToken": VQToken()}
    clips = [clip(arguments.seed * 1000 + i) for i in range(arguments.clips)]
    print("| reducer | " + " | ".join(f"coverage, asked at {n}" for n in COUNTS) + " | ms a clip at 32 |")
    print("| --- " * (len(COUNTS) + 2) + "|")
    for name, reducer in reducers.items():
        cells, milliseconds = [], 0.0
        for count in COUNTS:
            found = []
            start = time.perf_counter()
            for tokens, asked, words in clips:
                batch = TokenBatch.from_items([tokens], grids=[(FRAMES, SIDE, SIDE)])
                if isinstance(reducer, QueryReducer):
                    reduced = reducer.reduce(batch, count, query=[words])
                else:
                    reduced = reducer.reduce(batch, count)
                found.append((tokens, reduced.items()[0], asked))
            if count == 32:
                milliseconds = (time.perf_counter() - start) * 1000 / len(clips)
            scores = [measure(*each) for each in found]
            coverage, share = (sum(column) / len(scores) for column in zip(*scores, strict=True))
            cells.append(f"{coverage:.2f}, {share:.0%}")
        print(f"| {name} | " + " | ".join(cells) + f" | {milliseconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
