"""Losses of training: by hand, per image, and the weight that balances the adversarial one."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.training.discriminator import PatchDiscriminator
from tokenthrift.karl.training.losses import (
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    halting_loss,
)


def test_halting_loss_of_one_image_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, 3.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    kept = (math.log(2) + math.log1p(math.exp(2.0))) / 2
    halted = (math.log1p(math.exp(1.0)) + math.log1p(math.exp(-3.0))) / 2
    torch.testing.assert_close(halting_loss(logits, mask, torch.tensor([2])).item(), kept + halted)


def test_an_image_that_needs_all_tokens_has_none_to_halt() -> None:
    logits, mask = torch.tensor([[1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    for needed in (2, 5):
        torch.testing.assert_close(halting_loss(logits, mask, torch.tensor([needed])).item(), math.log1p(math.e))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 99))
def test_halting_loss_of_a_batch_is_the_mean_over_its_images(needed: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(needed), 6, generator=generator)
    counts = torch.randint(1, 7, (len(needed), 1), generator=generator)
    mask = torch.arange(6) < counts
    alone = [
        halting_loss(logits[i : i + 1, : counts[i]], mask[i : i + 1, : counts[i]], torch.tensor([n]))
        for i, n in enumerate(needed)
    ]
    poisoned = logits.masked_fill(~mask, float("nan"))
    together = halting_loss(poisoned, mask, torch.tensor(needed))
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_hinge_losses_at_and_beyond_the_margin() -> None:
    sure, unsure = torch.full((4,), 2.0), torch.zeros(4)
    assert discriminator_hinge(sure, -sure) == 0
    assert discriminator_hinge(unsure, unsure) == 1
    assert generator_hinge(sure) == -2


def test_pixel_error_is_per_image() -> None:
    images = torch.zeros(2, 3, 4, 4)
    made = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -0.25)])
    assert pixel_error(made, images).tolist() == [0.5, 0.25]


def test_the_adaptive_weight_equalises_gradients_at_the_last_layer() -> None:
    layer = nn.Linear(3, 1, bias=False)
    out = layer(torch.ones(1, 3)).sum()
    weight = adaptive_weight(6.0 * out, -2.0 * out, layer.weight)
    torch.testing.assert_close(weight.item(), 3.0, rtol=1e-3, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(out, 0.0 * out, layer.weight) <= 1e4


def test_the_discriminator_rates_patches_of_each_image_by_itself() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8)
    images = torch.rand(3, 3, 64, 48)
    logits = discriminator(images)
    assert logits.shape == (3, 1, 6, 4)
    torch.testing.assert_close(discriminator(images[1:2]), logits[1:2])
    assert not list(discriminator.buffers()), "running statistics would be missed by an average of the weights"
