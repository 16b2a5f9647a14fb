"""The upside-down procedure: which target errors are given, with which counts as answers."""

from __future__ import annotations

import io

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.karl.training.curriculum import ErrorCurriculum, relabeled
from tokenthrift.karl.training.draws import ImageDraws


def test_it_starts_uniform_over_the_five_bins_out_of_reach() -> None:
    curriculum = ErrorCurriculum()
    assert curriculum.probability.tolist() == [torch.tensor(0.2).item()] * 5 + [0.0] * 14
    assert set(curriculum.sample(draws(200)).tolist()) == set(torch.tensor(ERROR_BINS[:5]).tolist())


def draws(count: int) -> ImageDraws:
    return ImageDraws(range(count), torch.device("cpu"))


@given(st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=6, unique=True))
@settings(deadline=None, max_examples=30)
def test_what_is_drawn_for_an_image_depends_on_it_alone(seeds: list[int]) -> None:
    together = ImageDraws(seeds, torch.device("cpu"))
    found = [together.uniform(), together.counts(64, 4), together.normal_like(torch.zeros(len(seeds), 3, 2))]
    for i, seed in enumerate(seeds):
        alone = ImageDraws([seed], torch.device("cpu"))
        parts = [alone.uniform(), alone.counts(64, 4), alone.normal_like(torch.zeros(1, 3, 2))]
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(found, parts, strict=True))
    assert len(found[0].unique()) > 1
    assert not torch.equal(found[0], together.uniform())


def test_a_sum_that_rounds_below_one_draws_no_bin_that_has_faded() -> None:
    curriculum = ErrorCurriculum()

    class One(ImageDraws):
        def uniform(self) -> torch.Tensor:
            return torch.ones(2)

    assert curriculum.sample(One([0, 1], torch.device("cpu"))).tolist() == [torch.tensor(ERROR_BINS[4]).item()] * 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.001, 0.5), min_size=1, max_size=8))
def test_bins_fade_by_the_share_of_images_that_reached_them(reached: list[float]) -> None:
    curriculum = ErrorCurriculum()
    before = curriculum.probability.clone()
    curriculum.update(torch.tensor(reached))
    assert torch.isclose(curriculum.probability.sum(), torch.tensor(1.0))
    share = torch.tensor([sum(r <= b for r in torch.tensor(reached)) / len(reached) for b in torch.tensor(ERROR_BINS)])
    ratio = before * (1 - 0.01 * share)
    torch.testing.assert_close(curriculum.probability, ratio / ratio.sum())


def test_reached_bins_fade_away_for_good() -> None:
    curriculum = ErrorCurriculum()
    for _ in range(1000):
        curriculum.update(torch.tensor([0.015, 0.018]))
    torch.testing.assert_close(curriculum.probability[:2], torch.tensor([0.5, 0.5]), rtol=0, atol=1e-3)


def test_its_state_is_saved_and_resumed() -> None:
    """The published state is a plain tensor, which a checkpoint does not have."""
    curriculum = ErrorCurriculum()
    for _ in range(7):
        curriculum.update(torch.tensor([0.03, 0.2]))
    file = io.BytesIO()
    torch.save(curriculum.state_dict(), file)
    file.seek(0)
    resumed = ErrorCurriculum()
    assert not torch.equal(resumed.probability, curriculum.probability)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(resumed.probability, curriculum.probability)


def test_every_image_has_a_count_of_its_own() -> None:
    """The published code draws one for the batch, also beyond the most that an image may have."""
    counts = draws(400).counts(32, 4)
    assert sorted(set(counts.tolist())) == [4, 8, 12, 16, 20, 24, 28, 32]


def test_errors_are_relabeled_at_the_extremes_only_and_in_the_right_direction() -> None:
    errors = torch.full((300,), 0.1)
    counts = torch.tensor([1, 16, 32]).repeat(100)
    targets = relabeled(errors, counts, 1, 32, 0.5, draws(300))
    fewest, middle, most = (targets[i::3] for i in range(3))
    assert torch.equal(middle, errors[1::3])
    assert (most <= 0.1).all()
    assert (fewest >= 0.1).all()
    for changed in (most, fewest):
        assert 30 < (changed != 0.1).sum() < 70
    assert most.min() >= ERROR_BINS[0]
    assert fewest.max() <= ERROR_BINS[-1]
    assert torch.equal(relabeled(errors, counts, 1, 32, 0.0, draws(300)), errors)
