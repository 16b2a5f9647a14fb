"""VQToken with a published `compat`: the iterations, the search and the empty clusters of the released code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tokenizers.vqtoken.clips import mixture, noise
from tokenthrift.budget import TokenBudget
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken, VQTokenConfig, released

RELEASED = VQToken(VQTokenConfig(compat="released"))
OF_2025 = VQToken(VQTokenConfig(compat="released_2025"))


def test_the_rules_of_2025_are_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = TokenBatch.from_items([mixture(9, 60, spread=0.3)[0]])
    fixed = OF_2025.compress(tokens, TokenBudget(max_tokens=7))
    (usage,) = fixed.tokens.usage
    assert (usage.cap, usage.used) == (7, 7)
    assert fixed.maps[0].max() < 7
    assert (fixed.tokens.embeddings.norm(dim=2) <= 1 + 1e-5).all(), "means of unit tokens"
    again = OF_2025.compress(tokens, TokenBudget(max_tokens=7)).tokens
    assert torch.equal(again.embeddings, fixed.tokens.embeddings)
    fits: list[tuple[int, int]] = []

    def noted(x: torch.Tensor, centers: torch.Tensor, iterations: int) -> released.Fit:
        fits.append((len(centers), iterations))
        return kmeans(x, centers, 3)

    kmeans = released.kmeans_2025
    monkeypatch.setattr(released, "kmeans_2025", noted)
    model = VQToken(VQTokenConfig(compat="released_2025", selection_method="elbow", min_clusters=12, max_clusters=32))
    (usage,) = model.reduce(tokens, TokenBudget(max_tokens=40)).usage
    assert fits[:-1] == [(k, 100) for k in range(12, 33)], "21 fits"
    assert fits[-1] == (usage.used, 100), "and one more"
    assert 12 <= usage.used <= 22
    assert model.reduce(tokens, TokenBudget(max_tokens=5)).usage[0].used == 5
    silhouette = VQToken(
        VQTokenConfig(compat="released_2025", selection_method="silhouette", min_clusters=12, max_clusters=32)
    )
    assert silhouette.reduce(tokens, TokenBudget(max_tokens=40)).usage[0].used == 12
    with pytest.raises(ValueError, match="length zero"):
        OF_2025.reduce(TokenBatch.from_items([torch.zeros(9, 4)]), TokenBudget(max_tokens=3))


def test_a_published_search_stops_at_100_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kmeans = released.kmeans_2026

    def noted(x: torch.Tensor, centers: torch.Tensor, iterations: int) -> released.Fit:
        seen.append(iterations)
        return kmeans(x, centers, 2)

    monkeypatch.setattr(released, "kmeans_2026", noted)
    tokens = TokenBatch.from_items([noise(0, 30, 6)])
    fixed = VQTokenConfig(compat="released", min_clusters=2, max_clusters=4, max_iterations=50)
    for config in (fixed, replace(fixed, selection_method="elbow")):
        VQToken(config).reduce(tokens, TokenBudget(max_tokens=4))
    assert seen == [50, 100, 100, 100]


def test_an_empty_cluster_of_2025_has_a_row_of_zeros_and_of_2026_its_fitted_center() -> None:
    patches = noise(0, 5, 8)[torch.arange(40) % 5]  # five distinct patches for twelve clusters
    tokens = TokenBatch.from_items([patches])
    done = OF_2025.compress(tokens, 12)
    codes, labels = done.tokens.embeddings[0], done.maps[0].flatten()
    unit = torch.nn.functional.normalize(patches, dim=1)
    assert done.tokens.mask.sum() == 12
    assert len(labels.unique()) <= 5
    for k in range(12):
        expected = unit[labels == k].mean(0) if (labels == k).any() else torch.zeros(8)
        torch.testing.assert_close(codes[k], expected, rtol=0, atol=1e-6)
    newer = RELEASED.compress(tokens, 12).tokens.embeddings[0]
    torch.testing.assert_close(newer.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("compat", ["released", "released_2025"])
def test_a_released_compat_alone_stops_as_published(compat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    name = "kmeans_2025" if compat == "released_2025" else "kmeans_2026"
    kmeans = getattr(released, name)

    def noted(x: torch.Tensor, centers: torch.Tensor, iterations: int) -> released.Fit:
        seen.append(iterations)
        fit: released.Fit = kmeans(x, centers, 2)
        return fit

    monkeypatch.setattr(released, name, noted)
    tokens = TokenBatch.from_items([noise(0, 60, 6)])
    VQToken(VQTokenConfig(compat=compat)).reduce(tokens, 20)
    assert seen == [50]
    seen.clear()
    VQToken(VQTokenConfig(compat=compat, selection_method="elbow")).reduce(tokens, 40)
    assert seen == [100] * (22 if compat == "released_2025" else 21), "K = 12 to 32"
