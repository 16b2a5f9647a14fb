"""EffNet-lite0 distance: 0 for equal images, growing with damage, and a gradient that reaches the image alone."""

from __future__ import annotations

import torch

from tests.tokenizers.karl.training.training_runs import base_of
from tokenthrift.karl.feature_distance import FeatureDistance
from tokenthrift.karl.training.base_tokenizer import KarlBaseModule
from tokenthrift.karl.training.data import ImageBatch


def test_distance_grows_with_damage_and_each_image_has_its_own() -> None:
    distance = FeatureDistance().train()
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 64, 64, generator=generator), 5, 1, 2)
    noise = torch.randn(2, 3, 64, 64, generator=generator)
    found = torch.stack([distance(images + scale * noise, images) for scale in (0.0, 0.02, 0.1)])
    assert (found[0] == 0).all()
    assert (found.diff(dim=0) > 0).all()
    torch.testing.assert_close(distance(images[1:] + 0.1 * noise[1:], images[1:]), found[2, 1:])
    made = images.clone().requires_grad_()
    distance(made * 0.9, images).sum().backward()
    assert made.grad is not None
    assert made.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_training_adds_it_and_checkpoints_do_not_hold_it() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses, logged = [], {}
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        module = KarlBaseModule(base_of("vae"), feature_weight=weight)
        module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
        module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        losses.append(float(module.training_step(ImageBatch(images, (0, 1)), 0)))
        assert all(name.startswith("base.") for name in module.state_dict())
    torch.testing.assert_close(losses[1] - losses[0], 2.0 * logged["train/feature_distance"])
