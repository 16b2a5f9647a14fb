"""Originals beside reconstructions, drawn into whatever logger a run has.

Loggers that know images get them (TensorBoard, Weights & Biases); beside any other, such as the CSV logger, the picture
is written as a PNG into its folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift import extras

__all__ = ["draw", "sheet"]

GAP = 2  # white pixels between images


def sheet(rows: list[Tensor]) -> Tensor:
    """One picture of several rows of images.

    Args:
        rows: `(N, 3, H, W)` each, in about [0, 1]; all of one shape.

    Returns:
        `(3, height, width)` uint8.
    """
    images = torch.stack(rows).detach().float().clamp(0, 1).cpu()
    r, n, c, h, w = images.shape
    canvas = torch.ones(c, r * (h + GAP) - GAP, n * (w + GAP) - GAP)
    for i in range(r):
        for j in range(n):
            top, left = i * (h + GAP), j * (w + GAP)
            canvas[:, top : top + h, left : left + w] = images[i, j]
    return (canvas * 255).round().to(torch.uint8)


def draw(logger: Any, name: str, picture: Tensor, step: int) -> None:
    """Logs a picture.

    Args:
        logger: a Lightning logger, or None for nowhere.
        name: of the picture, such as `val/photos`.
        picture: `(3, height, width)` uint8.
        step: optimizer steps so far.
    """
    if logger is None:
        return
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        experiment.add_image(name, picture, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [picture.permute(1, 2, 0).numpy()], step=step)
    elif logger.log_dir is not None:
        path = Path(logger.log_dir) / "pictures" / f"{name.replace('/', '-')}-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        extras.require("PIL.Image").fromarray(picture.permute(1, 2, 0).numpy()).save(path)
