"""One set of images at many budgets, for evaluating and calibrating a model: base features are computed once.

Differs from encoding at every budget in nothing but time: where tokens are nested (the first n of m), one pass of the
encoder serves all counts. Reconstructions are clipped to [0, 1], as what leaves `Karl.decode` for a file is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.karl.calibration import Calibration, fit
from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.karl.halting import kept
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.model import Karl
from tokenthrift.padding import length_mask

__all__ = ["LADDER", "Prepared", "at_counts", "at_errors", "calibrate", "fewest", "prepare", "sweep"]

STRICTEST = ERROR_BINS[0]
"""What the encoder is conditioned on where only the count is limited."""
LADDER = tuple(e for e in ERROR_BINS if e <= 0.2)
"""Errors to condition on when calibrating; beyond them a reconstruction has little to do with its image."""
REFINEMENTS = 2
"""How often the step around a target is cut into eight, so that it becomes a sixty-fourth."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images `(B, 3, H, W)` in [0, 1] and their base features `(B, C, h, w)`."""

    images: Tensor
    features: Tensor


def prepare(karl: Karl, images: Tensor, batch: int = 64) -> Iterator[Prepared]:
    """Batches of images with their base features.

    Args:
        karl: the model; its device is used.
        images: `(N, 3, H, W)`, uint8 or in [0, 1].
        batch: images at once.
    """
    device = karl.to_tokens.weight.device
    for part in images.split(batch):
        part = part.to(device)
        part = part.float() / 255 if part.dtype == torch.uint8 else part
        yield Prepared(part, karl.base.encode(part))


def at_errors(karl: Karl, items: Prepared, error: float) -> tuple[Tensor, Tensor]:
    """What conditioning on an error leads to.

    Args:
        karl: the model.
        items: images.
        error: that the encoder is conditioned on.

    Returns:
        Tokens used `(B,)`, and reconstructions `(B, 3, H, W)`.
    """
    config = karl.config
    count = torch.full((len(items.images),), config.max_tokens, device=items.images.device)
    found = karl.encode_latents(items.images, items.features, count, torch.full_like(items.images[:, 0, 0, 0], error))
    keep = kept(found.halting_logits, found.mask, threshold=config.halting_threshold, prefix=config.halting == "prefix")
    return keep.sum(1), _decoded(karl, items, found.tokens, keep)


def at_counts(karl: Karl, items: Prepared, counts: Sequence[int | Tensor]) -> Iterator[Tensor]:
    """Reconstructions `(B, 3, H, W)` at each of some counts, conditioned on the strictest error, with nothing halted.

    Args:
        karl: the model.
        items: images.
        counts: a number for all images, or `(B,)` int64 for each.
    """
    device = items.images.device
    strict = torch.full_like(items.images[:, 0, 0, 0], STRICTEST)
    each = [n if isinstance(n, Tensor) else torch.full((len(strict),), n, device=device) for n in counts]
    nested = karl.support.nested
    if nested and each:
        most = torch.stack(each).amax(0)
        found = karl.encode_latents(items.images, items.features, most, strict)
    for count in each:
        if not nested:
            found = karl.encode_latents(items.images, items.features, count, strict)
        keep = length_mask(count)
        yield _decoded(karl, items, found.tokens[:, : keep.shape[1]], keep)


@torch.inference_mode()
def sweep(
    karl: Karl, images: Tensor, *, errors: Sequence[float] = (), counts: Sequence[int] = (), batch: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and errors of all images at all budgets.

    Args:
        karl: the model.
        images: `(N, 3, H, W)`, uint8 or in [0, 1].
        errors: that the encoder is conditioned on, in turn.
        counts: fixed counts.
        batch: images at once.

    Returns:
        On the CPU: tokens used `(N, errors)`, errors achieved under each condition `(N, errors)` and at counts
        `(N, counts)`.
    """
    used, achieved, fixed = [], [], []
    for items in prepare(karl, images, batch):
        size = len(items.images)
        found = [at_errors(karl, items, error) for error in errors]
        device = items.images.device
        used.append(torch.stack([n for n, _ in found], 1) if found else torch.empty(size, 0, device=device))
        achieved.append(_columns([pixel_error(made, items.images) for _, made in found], items.images))
        limited = [pixel_error(made, items.images) for made in at_counts(karl, items, counts)]
        fixed.append(_columns(limited, items.images))
    return torch.cat(used).cpu(), torch.cat(achieved).cpu(), torch.cat(fixed).cpu()


def fewest(errors: Tensor, counts: Sequence[int], target: float) -> Tensor:
    """The search oracle: the smallest count that meets the target error, or the largest where none does.

    Args:
        errors: `(N, counts)`.
        counts: ascending.
        target: the error.

    Returns:
        `(N,)` int64.
    """
    meets = errors <= target
    first = torch.where(meets.any(1), meets.long().argmax(1), len(counts) - 1)
    return torch.tensor(counts)[first]


def _columns(values: list[Tensor], images: Tensor) -> Tensor:
    return torch.stack(values, 1) if values else images.new_empty(len(images), 0)


def _decoded(karl: Karl, items: Prepared, tokens: Tensor, keep: Tensor) -> Tensor:
    grid = (items.features.shape[2], items.features.shape[3])
    output = karl.decode_latents(karl.quantize(tokens, keep).values, keep, grid)
    return karl.base.decode(karl.to_features(output, grid)).clamp(0, 1)


def calibrate(karl: Karl, images: Tensor, alpha: float, targets: Sequence[float] = (), batch: int = 64) -> Calibration:
    """Calibrates a model on images that it was not trained on.

    Keep the result with the model: `karl.config = dataclasses.replace(karl.config, calibration=...)`.

    Args:
        karl: the model.
        images: `(N, 3, H, W)`, uint8 or in [0, 1].
        alpha: share that may miss.
        targets: target errors that will be used; conditions near those that lead there are tried in small steps, so
            that no tokens are spent on staying further below them than is needed.
        batch: images at once.

    Raises:
        ValueError: too few images for so small an alpha.
    """
    requests, (_, achieved, _) = list(LADDER), sweep(karl, images, errors=LADDER, batch=batch)
    calibration = fit(achieved.tolist(), requests, alpha, karl.config.max_tokens)
    for _ in range(REFINEMENTS):
        between: set[float] = set()
        for error in targets:
            step_above = sum(bound <= error for bound in calibration.bounds)
            low, high = requests[max(step_above - 1, 0)], requests[min(step_above, len(requests) - 1)]
            between |= {round(low * (high / low) ** (step / 8), 6) for step in range(1, 8)}
        finer = sorted(between.difference(requests))
        if not finer:
            break
        _, more, _ = sweep(karl, images, errors=finer, batch=batch)
        order = sorted(range(len(requests) + len(finer)), key=lambda i: (requests + finer)[i])
        achieved, requests = torch.cat([achieved, more], 1)[:, order], sorted(requests + finer)
        calibration = fit(achieved.tolist(), requests, alpha, karl.config.max_tokens)
    return calibration
