"""What can be encoded and decoded: checks that say what was given and what is allowed.

The published code runs on anything of the right rank: [-1, 1] or 0 to 255 in place of [0, 1] only makes bad images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.karl.config import KarlConfig
from tokenthrift.tokens import TokenBatch

__all__ = ["check_images", "check_tokens", "grid_of"]

MAX_CELLS = 64 * 64


def check_images(images: Tensor, config: KarlConfig) -> tuple[int, int]:
    """Raises where images cannot be encoded.

    Args:
        images: meant to be `(B, 3, H, W)` floating-point in [0, 1].
        config: says which grids the model takes.

    Returns:
        Rows and columns of their grid.

    Raises:
        TypeError: not a tensor of floating-point numbers.
        ValueError: another shape, range or grid, or NaN.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor (B, 3, H, W), not {type(images).__name__}")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        hint = ""
        if len(shape) == 3:
            hint = "; one image is images[None]"
        elif len(shape) == 4 and shape[3] == 3:
            hint = "; channels come second: images.permute(0, 3, 1, 2)"
        elif len(shape) == 4 and shape[1] in (1, 4):
            hint = "; make it RGB first"
        raise ValueError(f"images must be (B, 3, H, W), not {shape}{hint}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point in [0, 1], not {images.dtype}; bytes are images / 255")
    if not shape[0]:
        raise ValueError("there are no images: B is 0")
    grid = grid_of(shape[2:], config)
    low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    bad = (~(torch.isfinite(low) & torch.isfinite(high))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"image {bad[0]} holds NaN or infinite values")
    bad = ((low < 0) | (high > 1)).nonzero().flatten().tolist()
    if bad:
        least, most = float(low[bad[0]]), float(high[bad[0]])
        hint = "images / 255" if most > 2 else "(images + 1) / 2" if least < 0 and most <= 1 else "images.clamp(0, 1)"
        raise ValueError(f"image {bad[0]} must be in [0, 1], found {least:g} to {most:g}; perhaps {hint}")
    return grid


def grid_of(size: Sequence[int], config: KarlConfig) -> tuple[int, int]:
    """Rows and columns of the grid of an image.

    Args:
        size: height and width in pixels.
        config: of the model.

    Raises:
        ValueError: the model has no such grid.
    """
    (height, width), factor = size, config.base.factor
    if config.compat == "released" and (height, width) != config.size:
        raise ValueError(
            f"the published model takes {config.size[0]} x {config.size[1]} pixels, not {height} x {width}"
        )
    if height < 1 or width < 1 or height % factor or width % factor:
        near = " x ".join(str(max(1, round(side / factor)) * factor) for side in (height, width))
        raise ValueError(f"sides must be multiples of {factor} pixels, not {height} x {width}; the nearest is {near}")
    rows, columns = height // factor, width // factor
    if rows * columns > MAX_CELLS:
        raise ValueError(
            f"{height} x {width} pixels are a grid of {rows * columns} cells, at most {MAX_CELLS} are read"
        )
    return rows, columns


def check_tokens(tokens: TokenBatch, config: KarlConfig) -> None:
    """Raises where tokens cannot be decoded.

    Raises:
        ValueError: they are of another width, stand where no token is, stand in one place twice, or are not finite.
    """
    dim, mask = tokens.embeddings.shape[2], tokens.mask
    if dim != config.token_dim:
        raise ValueError(f"tokens must have {config.token_dim} numbers each, not {dim}")
    positions, rows = tokens.positions[mask], config.max_position_embeddings
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < rows:
        found = f"{int(positions.min())} to {int(positions.max())}"
        raise ValueError(f"positions of tokens must be from 0 to {rows - 1}, found {found}")
    items = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    if len(torch.unique(items * rows + positions)) != len(positions):
        raise ValueError("two tokens of an image have the same position")
    if not bool(torch.isfinite(tokens.embeddings[mask]).all()):
        raise ValueError("a token holds NaN or infinite values")
