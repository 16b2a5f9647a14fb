"""From clusters to code vectors: means of the tokens as they are, medoids, or the published means of unit tokens.

Source: VQToken (arXiv 2503.16980, section 3.2): a code is the mean of the members of its cluster. The published code
averages tokens that were divided by their length, in the dtype of the model, so a code is never longer than 1 and a
language model that was trained on projector features cannot read it before fine-tuning. Here the tokens keep their
scale and are summed in float32 whatever their dtype; and a medoid, the real token most like its cluster's mean, is
there for models that should see nothing but real tokens.

Labels are constants: a gradient reaches the tokens through the means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenthrift.vqtoken.clustering import Clusters

__all__ = ["means", "medoids"]


def means(tokens: Tensor, labels: Tensor, slots: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every cluster, and how much they weigh.

    Args:
        tokens: (B, N, D) of any floating-point dtype; padding is not read.
        labels: (B, N) int64, -1 in padding.
        slots: Number of clusters; an empty one has a mean of zero.
        weights: (B, N) float32, how many native tokens each one stands for; 1 if not given.

    Returns:
        (B, slots, D) float32 and (B, slots) float32.
    """
    member = (labels[:, None] == torch.arange(slots, device=labels.device)[:, None]).float()
    if weights is not None:
        member = member * weights.masked_fill(labels < 0, 0.0)[:, None]
    mass = member.sum(2)
    share = member / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    with torch.autocast(tokens.device.type, enabled=False):
        return share @ tokens.float().masked_fill((labels < 0)[..., None], 0.0), mass


@torch.no_grad()
def medoids(unit: Tensor, clusters: Clusters) -> Tensor:
    """The token most like the mean of its cluster, the earliest of those that agree to 1e-6: (B, K) int64 columns.

    Args:
        unit: (B, N, D) as from `clustering.unit_tokens`.
        clusters: Of the same tokens.
    """
    slots = clusters.counts.shape[1]
    center = torch.nn.functional.normalize(clusters.sums, dim=2).float()
    own = clusters.labels[:, None] == torch.arange(slots, device=unit.device)[:, None]
    with torch.autocast(unit.device.type, enabled=False):
        likeness = (center @ unit.transpose(1, 2)).masked_fill(~own, -torch.inf)
    close = likeness >= likeness.amax(2, keepdim=True) - 1e-6
    return (close & own).long().argmax(2)
