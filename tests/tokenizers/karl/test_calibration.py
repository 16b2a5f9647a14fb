"""Conformal calibration: the guarantee holds on average, for any number of images and any target."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.config import ConfigError, from_plain, to_plain
from tokenthrift.karl.calibration import Calibration, conformal_quantile, fit, requested

REQUESTS = (0.01, 0.02, 0.04, 0.06, 0.09, 0.14)


def errors_of(images: int, random: torch.Generator) -> Tensor:
    """Errors (images, requests) of a model that overshoots more for harder images, and is not quite monotone."""
    hardness = torch.rand(images, 1, generator=random, dtype=torch.float64) ** 3
    noise = 0.005 * torch.randn(images, len(REQUESTS), generator=random, dtype=torch.float64)
    return (torch.tensor(REQUESTS, dtype=torch.float64) * (0.7 + hardness) + 0.01 * hardness + noise).abs()


@pytest.mark.parametrize(("images", "alpha", "target"), [(19, 0.1, 0.08), (40, 0.05, 0.07), (100, 0.1, 0.05)])
def test_misses_are_as_rare_as_alpha_says(images: int, alpha: float, target: float) -> None:
    random = torch.Generator().manual_seed(0)
    fresh = errors_of(20_000, random)
    misses, sets = [], 300
    for _ in range(sets):
        calibration = fit(errors_of(images, random).tolist(), REQUESTS, alpha, 256)
        try:
            place = REQUESTS.index(calibration.request(target))
        except BudgetError:
            misses.append(0.0)  # no request keeps it, so nothing is missed
            continue
        misses.append((fresh[:, place] > target).double().mean().item())
    mean = sum(misses) / sets
    spread = math.sqrt(sum((miss - mean) ** 2 for miss in misses) / sets / (sets - 1))
    assert mean <= alpha + 3 * spread


def test_the_quantile_is_exact_for_continuous_values() -> None:
    # For values without ties, the chance to exceed is (n + 1 - rank) / (n + 1), neither more nor less.
    random = torch.Generator().manual_seed(1)
    draws = torch.rand(20_000, 20, generator=random, dtype=torch.float64)
    bound = draws[:, :19].sort(1).values[:, math.ceil(20 * 0.9) - 1]
    assert all(conformal_quantile(row[:19].tolist(), 0.1) == b for row, b in zip(draws[:50], bound, strict=False))
    assert (draws[:, 19] > bound).double().mean().item() == pytest.approx(0.1, abs=0.007)


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=20, max_size=60),
    st.floats(0.05, 0.5),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_calibration_images_themselves_keep_the_bound(rows: list[list[float]], alpha: float, target: float) -> None:
    calibration = fit(rows, REQUESTS, alpha, 256)
    try:
        place = REQUESTS.index(calibration.request(target))
    except BudgetError:
        assert target < calibration.bounds[0]
        return
    assert sum(row[place] > target for row in rows) <= alpha * len(rows) + 1e-9
    # A larger error never asks for less than a smaller one did.
    assert calibration.request(target + 0.1) >= REQUESTS[place]


def test_the_nearest_error_that_is_named_can_be_kept() -> None:
    calibration = fit([[0.031, 0.05]] * 20, (0.01, 0.02), 0.1, 256)
    with pytest.raises(BudgetError, match="for all but 10% of images") as caught:
        calibration.request(0.03)
    assert calibration.request(float(str(caught.value.nearest)[1:])) == 0.01


def test_too_few_images_say_how_many_are_needed() -> None:
    with pytest.raises(ValueError, match="at least 19 images, not 18"):
        fit([[0.1]] * 18, (0.05,), 0.05, 256)
    assert fit([[0.1]] * 19, (0.05,), 0.05, 256).bounds == (0.1,)
    assert fit([[0.1]] * 9, (0.05,), 0.1, 256).bounds == (0.1,)
    with pytest.raises(ValueError, match="NaN"):
        fit([[0.1], [math.nan]] * 20, (0.05,), 0.1, 256)


def test_plain_data() -> None:
    calibration = fit([[0.03, 0.05]] * 20, (0.01, 0.02), 0.1, 256)
    assert from_plain(Calibration, to_plain(calibration)) == calibration
    for change in ({"alpha": 0.0}, {"bounds": [0.5, 0.1]}, {"requests": [0.02, 0.01]}, {"bounds": [0.1]}):
        with pytest.raises(ConfigError, match="calibration"):
            from_plain(Calibration, {**to_plain(calibration), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha must be between"),
        ({"alpha": 1.0}, "alpha must be between"),
        ({"images": 0}, "at least 1"),
        ({"tokens": 0}, "at least 1"),
        ({"requests": [], "bounds": []}, "at least one"),
        ({"requests": [0.02, 0.02]}, "must ascend"),
        ({"bounds": [0.2, 0.1]}, "not descend"),
    ],
)
def test_what_is_no_calibration(change: dict[str, object], message: str) -> None:
    fields = {"alpha": 0.5, "images": 1, "tokens": 1, "requests": [0.01, 0.02], "bounds": [0.1, 0.1]}
    assert from_plain(Calibration, fields).request(0.1) == 0.02
    with pytest.raises(ConfigError, match=message):
        from_plain(Calibration, {**fields, **change})


def test_a_request_is_kept_to_its_bound_and_no_further() -> None:
    calibration = Calibration(alpha=0.1, images=9, tokens=8, requests=(0.01, 0.02), bounds=(0.03, 0.05))
    assert [calibration.request(target) for target in (0.03, 0.0499, 0.05, 1.0)] == [0.01, 0.01, 0.02, 0.02]
    with pytest.raises(BudgetError, match="errors from 0.03 "):
        calibration.request(0.0299)


def test_requested_budgets() -> None:
    calibration = Calibration(alpha=0.1, images=9, tokens=8, requests=(0.01, 0.02), bounds=(0.03, 0.05))
    budgets = [TokenBudget(target_error=0.04, min_tokens=2), TokenBudget(target_error=0.05, max_tokens=8)]
    assert requested(calibration, budgets, [8, 12]) == [
        TokenBudget(target_error=0.01, min_tokens=2),
        TokenBudget(target_error=0.02, max_tokens=8),
    ]
    with pytest.raises(BudgetError, match="at most 7 tokens"):
        requested(calibration, budgets, [8, 7])
    with pytest.raises(BudgetError, match="without target_error"):
        requested(calibration, [TokenBudget()], [8])
    with pytest.raises(BudgetError, match="with a calibration"):
        requested(None, budgets, [8, 8])


def test_an_errors_ladder_can_only_rise() -> None:
    """A smaller error at a looser request is no reason to believe in it."""
    assert fit([[0.05, 0.03]] * 9, (0.01, 0.02), 0.1, 8).bounds == (0.05, 0.05)
    rows = [[0.01 * i] for i in range(1, 20)]
    assert fit(rows, (0.05,), 0.1, 8).bounds[0] == pytest.approx(0.18)
    assert fit(rows, (0.05,), 0.5, 8).bounds[0] == pytest.approx(0.10)
