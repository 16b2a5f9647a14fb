"""Originals beside reconstructions, in every logger that a run has.

Loggers that know images get them (TensorBoard, Weights & Biases); beside any other, such as the CSV logger, the images
are written as a PNG into its folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenthrift import extras

__all__ = ["image_rows", "log_images"]

GAP = 2  # white pixels between images


def image_rows(rows: list[Tensor]) -> Tensor:
    """Several rows of images as one image.

    Args:
        rows: `(N, 3, H, W)` each, in about [0, 1]; all of one shape.

    Returns:
        `(3, height, width)` uint8.
    """
    images = torch.cat(rows).detach().float().clamp(0, 1).cpu()
    make_grid = extras.require("torchvision.utils").make_grid
    grid: Tensor = make_grid(images, nrow=len(rows[0]), padding=GAP, pad_value=1.0)
    return (grid * 255).round().to(torch.uint8)


def log_images(loggers: Iterable[Any], name: str, rows: list[Tensor], step: int) -> None:
    """Logs rows of images with each logger of a run.

    Args:
        loggers: Lightning's.
        name: of the image, such as `val/photos`.
        rows: see `image_rows`.
        step: optimizer steps so far.
    """
    image = image_rows(rows)
    for logger in loggers:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_image"):
            experiment.add_image(name, image, step)
        elif hasattr(logger, "log_image"):
            logger.log_image(name, [image.permute(1, 2, 0).numpy()], step=step)
        elif logger.log_dir is not None:
            path = Path(logger.log_dir) / "images" / f"{name.replace('/', '-')}-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            extras.require("PIL.Image").fromarray(image.permute(1, 2, 0).numpy()).save(path)
