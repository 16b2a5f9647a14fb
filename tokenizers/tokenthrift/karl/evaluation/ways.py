"""Ways of coding a set of images, and what each of them costs and keeps.

The published evaluation (arXiv 2507.07995) compares models with each other at a few counts. Here a model is compared
with itself: adaptive counts, verified ones, one fixed count for all images at the same mean, and all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenthrift.budget import TokenBudget
from tokenthrift.karl.evaluation.metrics import METRICS
from tokenthrift.karl.evaluation.sweeps import Prepared, at_counts, prepare
from tokenthrift.karl.model import Karl
from tokenthrift.karl.verified import encode_verified, encoder_passes

__all__ = ["TIMED_BATCH", "Coder", "Quality", "Way", "equal_mean", "fixed", "quality", "times", "verified"]

Coder = Callable[[Prepared], tuple[Tensor, Tensor]]
"""Images to tokens used `(B,)` and reconstructions `(B, 3, H, W)`."""
TIMED_BATCH = 8


@dataclass(frozen=True, slots=True)
class Quality:
    """One way of coding a set of images; a figure for each image."""

    tokens: Tensor
    metrics: dict[str, Tensor]

    @property
    def error(self) -> Tensor:
        """L1, `(N,)`."""
        return self.metrics["L1"]


@dataclass(frozen=True, slots=True)
class Way:
    """A way of coding, as a table shows it."""

    quality: Quality
    encoder_passes: float | None = 1
    """Mean of an image; None where an oracle knows the answer."""
    decoder_passes: float | None = 1


def quality(karl: Karl, images: Tensor, coder: Coder, extra: Mapping[str, Any], batch: int = 64) -> Quality:
    """Codes images and measures what comes out.

    Args:
        karl: the model.
        images: `(N, 3, H, W)` uint8.
        coder: tokens and reconstructions of a batch; called in order.
        extra: further metrics by name, beside `METRICS`.
        batch: images at once.
    """
    tokens: list[Tensor] = []
    found: dict[str, list[Tensor]] = {}
    for items in prepare(karl, images, batch):
        used, made = coder(items)
        tokens.append(used.cpu())
        for name, metric in {**METRICS, **extra}.items():
            found.setdefault(name, []).append(metric(made, items.images).cpu())
    return Quality(torch.cat(tokens), {name: torch.cat(parts) for name, parts in found.items()})


def fixed(karl: Karl, counts: Tensor) -> Coder:
    """Codes with given counts `(N,)`, one for each image of the set, in order."""
    rows = iter(counts.tolist())

    def code(items: Prepared) -> tuple[Tensor, Tensor]:
        part = torch.tensor([next(rows) for _ in items.images], device=items.images.device)
        return part, next(at_counts(karl, items, [part]))

    return code


def verified(karl: Karl, error: float, measured: Callable[[Coder], Quality]) -> Way:
    """Codes with `encode_verified`, and counts the passes of each image.

    Args:
        karl: the model.
        error: target.
        measured: runs a coder over the set.
    """
    rounds: list[int] = []

    def code(items: Prepared) -> tuple[Tensor, Tensor]:
        tokens = encode_verified(karl, items.images, TokenBudget(target_error=error))
        rounds.extend(usage.rounds for usage in tokens.usage)
        return tokens.mask.sum(1), karl.decode(tokens)

    found = measured(code)
    encoded = [encoder_passes(passes, karl.support.nested) for passes in rounds]
    return Way(found, sum(encoded) / len(encoded), sum(rounds) / len(rounds))


def equal_mean(mean: float, size: int, native: int) -> Tensor:
    """Counts `(size,)` that are all `floor(mean)` or one more, with the given mean to within one token of the set."""
    total = min(round(mean * size), native * size)
    counts = torch.full((size,), total // size)
    # Spread over the set, so that the extra tokens favor no part of it.
    counts[torch.arange(total % size) * size // max(1, total % size)] += 1
    return counts


def times(karl: Karl, images: Tensor, target: float, repeats: int = 5) -> dict[str, float]:
    """Milliseconds an image, median of some batches, each way in turn."""
    found: dict[str, list[float]] = {}
    budget = TokenBudget(target_error=target)
    for start in range(0, TIMED_BATCH * repeats, TIMED_BATCH):
        part = images[start : start + TIMED_BATCH].to(karl.to_tokens.weight.device).float() / 255
        if len(part) < TIMED_BATCH:
            break
        ways: dict[str, Callable[[Tensor], object]] = {
            "one pass": lambda x: karl.decode(karl.encode(x, budget)),
            "one pass, verified": lambda x: karl.decode(encode_verified(karl, x, budget)),
            "all tokens": lambda x: karl.decode(karl.encode(x)),
        }
        for way, run in ways.items():
            begun = time.perf_counter()
            run(part)
            if part.is_cuda:
                torch.cuda.synchronize()
            found.setdefault(way, []).append((time.perf_counter() - begun) * 1000 / TIMED_BATCH)
    return {way: sorted(values)[len(values) // 2] for way, values in found.items()}
