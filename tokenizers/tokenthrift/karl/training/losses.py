"""What KARL's training minimises, as functions of tensors.

Source: KARL (arXiv 2507.07995), section 3 and appendix: binary cross-entropy of the halting head, L1, LPIPS on VGG-16
and a hinge PatchGAN with VQGAN's adaptive weight (arXiv 2012.09841).

What differs: every image has its own count, so the halting loss balances kept and halted tokens within each image; and
LPIPS is given images in [-1, 1], as it was made for, where the published code gives it [0, 1].
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift import extras

__all__ = ["Lpips", "adaptive_weight", "discriminator_hinge", "generator_hinge", "halting_loss"]


def halting_loss(logits: Tensor, mask: Tensor, needed: Tensor) -> Tensor:
    """Cross-entropy of the halting head: the first `needed` tokens of an image stay, the others are halted.

    Both kinds weigh the same within an image, however many there are of each.

    Args:
        logits: `(B, T)`, of the probability that a token is halted.
        mask: `(B, T)` bool, True where there is a token.
        needed: `(B,)` int64, at least 1; where it is T or more, nothing is halted.

    Returns:
        A scalar, the mean over images.
    """
    halted = torch.arange(logits.shape[1], device=logits.device) >= needed[:, None]
    losses = F.binary_cross_entropy_with_logits(logits.float(), halted.float(), reduction="none")

    def mean(where: Tensor) -> Tensor:
        return losses.masked_fill(~where, 0).sum(1) / where.sum(1).clamp(min=1)

    return (mean(halted & mask) + mean(~halted & mask)).mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator, of its logits for real and for made images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Hinge loss of the generator, of the discriminator's logits for what it made."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How much of the adversarial loss balances the reconstruction loss at the decoder's last layer.

    Args:
        reconstruction: a scalar with a graph.
        adversarial: likewise.
        last: the weight of the last layer, which both depend on.

    Returns:
        The ratio of their gradients' norms, at most 10,000, without a graph.
    """
    ours: Tensor = torch.autograd.grad(reconstruction, last, retain_graph=True)[0]
    theirs: Tensor = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    ratio = torch.linalg.vector_norm(ours) / (torch.linalg.vector_norm(theirs) + 1e-4)
    return cast(Tensor, ratio.clamp(0, 1e4).detach())


class Lpips(nn.Module):
    """LPIPS on VGG-16, frozen; torchvision finds or downloads the weights."""

    def __init__(self) -> None:
        super().__init__()
        metric = extras.require("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity(net_type="vgg")
        self.net = cast(nn.Module, metric.net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Lpips:
        """Stays in evaluation mode: it has dropout."""
        return super().train(False)

    def forward(self, made: Tensor, images: Tensor) -> Tensor:
        """Distances `(B,)` of images `(B, 3, H, W)` in [0, 1], at least 32 px a side."""
        distance = self.net(2 * made - 1, 2 * images - 1)
        return cast(Tensor, distance).flatten()
