"""How near a reconstruction is to its image, one figure for each image.

L1 is KARL's own error (arXiv 2507.07995). PSNR, SSIM and rank correlation are torchmetrics'. LPIPS (arXiv 1801.03924)
needs the weights that torchvision downloads. Where they are not on this machine, nothing is called LPIPS: the
perceptual column is then GMSD (Xue et al. 2014, arXiv 1308.3052), the deviation of gradient similarity, which needs
none.

What differs: the published evaluation gives LPIPS images in [0, 1], where it was made for [-1, 1], so that its figures
are on a scale of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift import extras
from tokenthrift.karl.latent.conditioning import pixel_error

__all__ = ["METRICS", "gmsd", "perceptual", "psnr", "spearman", "ssim"]

_LPIPS_WEIGHTS = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
_GMSD_CONSTANT = 170 / 255**2  # of the published method, for images in [0, 1]


def psnr(made: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `(B,)` in dB, of images `(B, 3, H, W)` in [0, 1]; at most 100, so that means exist."""
    image = extras.require("torchmetrics.functional.image")
    found: Tensor = image.peak_signal_noise_ratio(made, images, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return found.reshape(len(images)).clamp(max=100)


def ssim(made: Tensor, images: Tensor) -> Tensor:
    """Structural similarity `(B,)`, 1 for equal images; at least 11 px a side."""
    image = extras.require("torchmetrics.functional.image")
    found: Any = image.structural_similarity_index_measure(made, images, data_range=1.0, reduction="none")
    return cast(Tensor, found).reshape(len(images))


def gmsd(made: Tensor, images: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation `(B,)` of luminance, 0 for equal images."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    horizontal = torch.tensor([[1.0, 0, -1]] * 3, device=images.device) / 3
    kernel = torch.stack([horizontal, horizontal.T])[:, None]

    def magnitude(batch: Tensor) -> Tensor:
        gray = torch.einsum("bchw,c->bhw", batch.float(), weights)[:, None]
        half = F.avg_pool2d(gray, 2)
        return F.conv2d(half, kernel, padding=1).square().sum(1).sqrt()

    a, b = magnitude(made), magnitude(images)
    similarity = (2 * a * b + _GMSD_CONSTANT) / (a.square() + b.square() + _GMSD_CONSTANT)
    return similarity.flatten(1).std(1, correction=0)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"L1": pixel_error, "PSNR (dB)": psnr, "SSIM": ssim}
"""By the name that a report's column carries."""


def perceptual(weights: Path | None = None) -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """The perceptual distance that can be had here, and its name.

    Args:
        weights: folder to look for torchvision's weights in; its own cache if not given.

    Returns:
        LPIPS on AlexNet or VGG-16 where their weights are, else GMSD.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints") if weights is None else weights
    for net, name in _LPIPS_WEIGHTS.items():
        if (folder / name).is_file():
            lpip = extras.require("torchmetrics.image.lpip")
            model: Any = lpip.LearnedPerceptualImagePatchSimilarity(net_type=net).net.eval()

            def lpips(made: Tensor, images: Tensor, model: Any = model) -> Tensor:
                return cast(Tensor, model.to(images.device)(2 * made - 1, 2 * images - 1)).flatten()

            return f"LPIPS ({net})", lpips
    return "GMSD (no LPIPS weights here)", gmsd


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; NaN where one of them is constant."""
    if len(torch.unique(a)) < 2 or len(torch.unique(b)) < 2:
        return float("nan")
    return float(extras.require("torchmetrics.functional").spearman_corrcoef(a.double(), b.double()))
