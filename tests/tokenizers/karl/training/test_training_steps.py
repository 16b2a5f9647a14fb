"""What a step of either stage computes: two passes, guidance, the codebook; none of the published mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, distributed, nn

from tests.processes import together
from tests.tokenizers.karl.training.training_runs import (
    SIZE,
    TOKENS,
    Kind,
    fit,
    model_of,
    smooth_images,
    stage,
)
from tokenthrift.karl.training.draws import ImageDraws
from tokenthrift.karl.training.guidance import pyramid
from tokenthrift.karl.training.losses import Lpips
from tokenthrift.karl.training.module import KarlStage1Module
from tokenthrift.karl.training.stage import KarlModule

# Advice about loaders, folders and the next release of torch.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth images."""
    return smooth_images(tmp_path_factory.mktemp("karl"))


def test_every_image_is_given_a_count_of_its_own(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published training draws one for the batch."""
    seen: list[Tensor] = []
    whole = KarlStage1Module.first_pass

    def spy(self: KarlModule, images: Tensor, features: Tensor, counts: Tensor, draws: ImageDraws) -> Any:
        seen.append(counts)
        return whole(self, images, features, counts, draws)

    monkeypatch.setattr(KarlStage1Module, "first_pass", spy)
    fit(stage(1), pack, steps=10)
    assert sum(len(counts.unique()) > 1 for counts in seen) >= 9
    assert min(int(c.min()) for c in seen) >= 1
    assert max(int(c.max()) for c in seen) <= TOKENS


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_pass_over_a_batch_is_the_passes_over_its_images(attention: str) -> None:
    """The published masks belong to the wrong images wherever there is more than one."""
    halting = "prefix" if attention == "causal" else "subset"
    module = stage(1, config=model_of(latent_attention=attention, halting=halting)).eval()
    with torch.no_grad():
        module.model.halting.mlp[2].weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        features = module.model.base.encode(images)
        errors = torch.tensor([0.02, 0.1, 0.3])
        together = module.second_pass(images, features, errors)
        assert together.keep.sum() < together.keep.numel(), "some tokens are halted"
        for i in range(3):
            one = slice(i, i + 1)
            alone = module.second_pass(images[one], features[one], errors[one])
            assert torch.equal(alone.keep, together.keep[one])
            torch.testing.assert_close(alone.output, together.output[one], rtol=0, atol=1e-5)


def test_the_target_error_acts_from_the_first_step() -> None:
    module = stage(1).eval()
    images = torch.rand(1, 3, SIZE, SIZE)
    features = module.model.base.encode(images)
    outputs = [module.second_pass(images, features, torch.tensor([e])).output for e in (0.02, 0.3)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_lpips_is_given_images_between_minus_one_and_one() -> None:
    """The published code gives it [0, 1]."""
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, made: Tensor, images: Tensor) -> Tensor:
            seen.extend([made, images])
            return (made - images).abs().mean((1, 2, 3), keepdim=True)

    lpips = Lpips.__new__(Lpips)
    nn.Module.__init__(lpips)
    lpips.net = Net()
    assert lpips(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).tolist() == [2.0, 2.0]
    assert [(t.min().item(), t.max().item()) for t in seen] == [(-1, -1), (1, 1)]
    assert not lpips.train().training


@pytest.mark.parametrize("kind", ["vqgan", "vae"])
def test_grids_need_not_be_square(kind: Kind) -> None:
    """The published VQGAN path works for 16 x 16 cells of 256 channels only."""
    module = stage(1, kind, config=model_of(kind, grid=[2, 6]))
    images = torch.rand(2, 3, 8, 24)
    features = module.model.base.encode(images)
    assert features.shape[2:] == (2, 6), "as many cells as no square has"
    one = module.first_pass(images, features, torch.tensor([3, 5]), ImageDraws([0, 1], images.device))
    assert module.decoded(one, features).shape == images.shape
    assert module.reconstruction_loss(one.output, features).isfinite()


def test_dead_codes_move_onto_tokens(pack: Path) -> None:
    module = stage(1, restart_every=5, restart_below=0.9)
    with torch.no_grad():
        module.model.quantizer.usage[:30] = 0
    before = module.model.quantizer.codebook.detach().clone()
    fit(module, pack, steps=5)
    after = nn.functional.normalize(module.model.quantizer.codebook.detach(), dim=1)
    offered = nn.functional.normalize(module.token_buffer, dim=1)
    moved = (after @ offered.T).max(1).values > 1 - 1e-5
    assert moved[:30].sum() >= 25
    assert not torch.equal(before, module.model.quantizer.codebook)


def test_tokens_stay_continuous_at_first_and_the_codebook_is_laid_onto_them(pack: Path) -> None:
    module = stage(1, quantize_start_step=3, restart_every=0)
    before = module.model.quantizer.codebook.detach().clone()
    fit(module, pack, steps=2)
    assert torch.equal(before, module.model.quantizer.codebook), "not used yet"
    module = stage(1, quantize_start_step=3, restart_every=0)
    fit(module, pack, steps=3)
    torch.testing.assert_close(module.model.quantizer.codebook.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize(("grid", "levels"), [((4, 4), [1, 4, 16]), ((2, 4), [1, 4, 8]), ((1, 1), [1])])
def test_a_pyramid_goes_from_the_whole_to_the_cells(grid: tuple[int, int], levels: list[int]) -> None:
    features = torch.randn(2, 3, *grid)
    means = pyramid(features, 99)
    assert means.shape == (2, sum(levels), 3)
    torch.testing.assert_close(means[:, 0], features.mean((2, 3)))
    torch.testing.assert_close(means[:, -levels[-1] :], features.flatten(2).transpose(1, 2))
    assert torch.equal(pyramid(features, 3), means[:, :3])


def test_tokens_are_guided_by_the_pyramid_first(pack: Path) -> None:
    module = stage(1, config=model_of(max_tokens=21), guide_until_step=40, second_pass_start_step=41)
    token_losses: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            token_losses.append(float(trainer.callback_metrics["train/guide_tokens"]))

    fit(module, pack, Watch(), steps=40)
    directions = nn.functional.normalize(module.components)
    torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), rtol=0, atol=1e-3)
    assert sum(token_losses[-5:]) < 0.7 * sum(token_losses[:5])
    assert module.curriculum.probability.max() < 0.3, "no second pass, no curriculum"


class Stepped(KarlStage1Module):
    """Without a trainer."""

    global_step: Any = 0


def restarted(module: Stepped) -> dict[str, Tensor]:
    """Lays a codebook onto tokens of this process and moves dead codes."""
    quantizer, rank = module.model.quantizer, distributed.get_rank()
    assert quantizer is not None
    torch.manual_seed(1 + rank)
    module.remember(torch.randn(32, 6))
    module.global_step = 2
    module.on_train_batch_end(None, None, 1)
    found = {"remembered": module.token_buffer, "laid": quantizer.codebook.detach().clone()}
    quantizer.usage[: 4 + rank] = 0
    module.global_step = 4
    module.on_train_batch_end(None, None, 3)
    return {**found, "moved": quantizer.codebook.detach(), "usage": quantizer.usage}


def test_codes_move_to_the_same_places_in_every_process(tmp_path: Path) -> None:
    """Otherwise the processes train different models from the first restart on."""
    module = Stepped(model_of("vae"), restart_every=4, quantize_start_step=2)
    one, other = together(tmp_path, restarted, module)
    assert not torch.equal(one["remembered"], other["remembered"])
    for name in ("laid", "usage", "moved"):
        assert torch.equal(one[name], other[name])
    assert not torch.equal(one["laid"], one["moved"])


def test_extreme_counts_are_given_other_targets(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code has the paper's augmentation, and no longer calls it."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    whole = KarlModule.second_targets

    def spy(self: KarlModule, counts: Tensor, achieved: Tensor, draws: ImageDraws) -> Tensor:
        targets = whole(self, counts, achieved, draws)
        seen.append((counts, achieved, targets))
        return targets

    monkeypatch.setattr(KarlModule, "second_targets", spy)
    fit(stage(1, relabel_prob=1.0, count_step=4), pack, steps=4)  # 4 or 8 tokens: the fewest or the most
    counts, achieved, targets = map(torch.cat, zip(*seen, strict=True))
    assert (targets[counts == 4] > achieved[counts == 4]).all()
    assert (targets[counts == TOKENS] < achieved[counts == TOKENS]).all()
    assert set(counts.tolist()) == {4, TOKENS}
    module = stage(1, relabel_prob=1.0)
    middle, draws = torch.full((9,), 0.1), ImageDraws(range(9), torch.device("cpu"))
    assert torch.equal(module.second_targets(torch.full((9,), 5), middle, draws), middle)
