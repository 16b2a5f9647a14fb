"""The visual front: its pool in two dimensions against that of the published module, in three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenthrift.mtsk.audiovisual.avhubert import AvHubert


@pytest.mark.parametrize("side", [43, 44, 88])
@pytest.mark.parametrize("training", [False, True])
def test_the_pool_in_two_dimensions_is_the_published_one(side: int, training: bool) -> None:
    torch.manual_seed(0)
    front = AvHubert(64, 1, 1, 64, (4, 4, 8, 8)).feature_extractor_video.resnet.train(training).double()
    video = torch.randn(2, 5, side, side, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def published() -> Tensor:
        """Every layer of `frontend3D` in turn, the pool among them."""
        frames = front.frontend3D[0](video[:, None]).transpose(1, 2)[valid][:, :, None]
        features: Tensor = front.trunk(front.frontend3D[1:](frames)[:, :, 0])
        return features

    def values_and_gradients(features: Tensor) -> list[Tensor]:
        assert features.shape == (8, 8)
        return [features, *torch.autograd.grad(features.square().sum(), list(front.parameters()))]

    torch.testing.assert_close(values_and_gradients(front(video, valid)), values_and_gradients(published()))
