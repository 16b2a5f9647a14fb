"""The upside-down procedure: which errors are asked for, with which counts as answers."""

from __future__ import annotations

import io

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.karl.training.curriculum import ErrorCurriculum, draw_counts, other_errors


def test_it_starts_uniform_over_the_five_bins_out_of_reach() -> None:
    curriculum = ErrorCurriculum()
    assert curriculum.probability.tolist() == [torch.tensor(0.2).item()] * 5 + [0.0] * 14
    torch.manual_seed(0)
    assert set(curriculum.sample(200).tolist()) == set(torch.tensor(ERROR_BINS[:5]).tolist())


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
    torch.manual_seed(0)
    counts = draw_counts(400, 32, 4, torch.device("cpu"))
    assert sorted(set(counts.tolist())) == [4, 8, 12, 16, 20, 24, 28, 32]


def test_errors_are_exchanged_at_the_extremes_only_and_in_the_right_direction() -> None:
    torch.manual_seed(0)
    errors = torch.full((300,), 0.1)
    counts = torch.tensor([1, 16, 32]).repeat(100)
    asked = other_errors(errors, counts, 1, 32, share=0.5)
    fewest, middle, most = (asked[i::3] for i in range(3))
    assert torch.equal(middle, errors[1::3])
    assert (most <= 0.1).all()
    assert (fewest >= 0.1).all()
    for changed in (most, fewest):
        assert 30 < (changed != 0.1).sum() < 70
    assert most.min() >= ERROR_BINS[0]
    assert fewest.max() <= ERROR_BINS[-1]
    assert torch.equal(other_errors(errors, counts, 1, 32, share=0.0), errors)
