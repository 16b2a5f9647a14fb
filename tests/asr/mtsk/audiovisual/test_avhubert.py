"""The visual front: its pool in two dimensions, its positions in bf16, against what the published module computes."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("size", [32, 64, 128, 192, 256, 768])
@pytest.mark.parametrize("autocast", [False, True])
def test_positions_in_bf16_are_those_of_float64(size: int, autocast: bool) -> None:
    """Of all widths: oneDNN 3.12 reads wrong weights on AMX where a group of this convolution has few channels."""
    torch.manual_seed(0)
    layer: Any = AvHubert(size, 1, 1, 16, (4, 4, 8, 8)).encoder.pos_conv[0]
    torch.nn.init.normal_(layer.bias)
    states = torch.randn(2, size, 40).bfloat16()
    v, g, bias = (p.bfloat16().double() for p in (layer.weight_v, layer.weight_g, layer.bias))
    weight = v * (g / v.norm(dim=(0, 1), keepdim=True))
    expected = torch.conv1d(states.double(), weight, bias, padding=64, groups=16)[..., :-1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = (layer if autocast else layer.bfloat16())(states)
    assert found.dtype == torch.bfloat16
    error = (found.double() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.02, f"{error:.1%} of the spread"
