"""The complexity study of an evaluation: how many tokens a model gives to pictures of each family.

Source: KARL (arXiv 2507.07995), section 5. What differs: see `complexity`, which draws the pictures and measures them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenthrift.evaluation.report import Cell, Table
from tokenthrift.karl.evaluation.complexity import FAMILIES, jpeg_bytes, make, shuffled
from tokenthrift.karl.evaluation.metrics import spearman
from tokenthrift.karl.evaluation.sweeps import at_counts, at_errors, prepare
from tokenthrift.karl.model import Karl

__all__ = ["IMAGES", "complexity_table", "families", "studied"]

IMAGES = 40  # of each family


def families(karl: Karl, test: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Pictures `(N, 3, H, W)` in [0, 1] by family: drawn ones, those of the test sets, and these shuffled."""
    height, width = karl.config.size
    drawn = {family: make(family, IMAGES, max(height, width), seed) for family in FAMILIES}
    found = {family: pictures[..., :height, :width] for family, pictures in drawn.items()}
    for name, images in test.items():
        found[name] = images[:IMAGES].float() / 255
        found[f"{name}, shuffled"] = shuffled(found[name], seed=seed)
    return found


def studied(karl: Karl, pictures: Tensor, wanted: float, native: int) -> dict[str, Any]:
    (items,) = prepare(karl, pictures, len(pictures))
    tokens, made = at_errors(karl, items, wanted)
    few, whole = (
        (m - items.images).abs().flatten(1).mean(1) for m in at_counts(karl, items, [max(1, native // 8), native])
    )
    errors = (made - items.images).abs().flatten(1).mean(1)
    examples = zip(items.images[:6], made[:6], tokens[:6].tolist(), errors[:6].tolist(), strict=True)
    return {
        "bytes": jpeg_bytes(items.images),
        "tokens": tokens.tolist(),
        "error": errors.mean().item(),
        "structure": (few - whole).mean().item(),
        "examples": list(examples),
    }


def complexity_table(study: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for family, found in sorted(study.items(), key=lambda item: sum(item[1]["bytes"])):
        count = len(found["tokens"])
        means = (sum(found["bytes"]) / count, sum(found["tokens"]) / count)
        rows.append((family, count, *means, found["error"], found["structure"]))
    sizes, tokens = (torch.tensor([v for f in study.values() for v in f[key]]) for key in ("bytes", "tokens"))
    return Table(
        title="Tokens against complexity",
        columns=("family", "images", "bytes as JPEG", "tokens", "L1", "structure"),
        rows=tuple(rows),
        note=f"Spearman of tokens and bytes over all {len(sizes)} images: {spearman(tokens, sizes):.3f}. Structure: L1 "
        "at an eighth of the tokens minus L1 at all of them.",
    )
