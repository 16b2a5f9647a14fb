"""KARL in 20 lines: pictures as tokens under a budget, as bytes, and back.

python examples/karl_in_20_lines.py samples/pictures/*.jpg
"""

import sys

import torch

from tokenthrift.karl import Karl
from tokenthrift.media.image import read_image, square

paths = sys.argv[1:]
karl = Karl.from_pretrained("model_cards/karl-tiny-64")
images = torch.stack([square(read_image(path), 64) for path in paths])  # (B, 3, 64, 64) in [0, 1]
for budget in ("4", "32", "e0.12"):
    tokens = karl.encode(images, budget)
    pictures = karl.decode(tokens)
    for path, usage, error in zip(paths, tokens.usage, (pictures - images).abs().mean((1, 2, 3)), strict=True):
        print(f"{budget:>6}  {path}: {usage.used} of {usage.native} tokens, error {error:.3f}")
data = karl.to_bytes(tokens)
again, size = karl.from_bytes(data)
assert torch.equal(again.codes, tokens.codes)
print(f"{len(data)} bytes for {len(paths)} pictures of {size[0]} x {size[1]} pixels")
