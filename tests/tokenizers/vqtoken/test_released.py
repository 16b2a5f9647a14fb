"""The published rules: equal to recorded outputs of the published code, or to its rules written out token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tokenizers.vqtoken.clips import mixture, noise
from tokenthrift.vqtoken import released
from tokenthrift.vqtoken.attention import ReleasedVQAttention


@pytest.fixture(scope="module")
def recorded(reference: Path) -> dict[str, Tensor]:
    return load_file(reference / "vqtoken" / "kmeans_v2.safetensors")


def test_the_fit_of_2026_from_given_centers(recorded: dict[str, Tensor]) -> None:
    tokens = recorded["tokens"].flatten(0, 1)
    unit = torch.nn.functional.normalize(tokens, dim=1)
    fit = released.kmeans_2026(tokens, unit[recorded["fixed_K8.init_idx"]])
    assert torch.equal(fit.labels.view(4, 49), recorded["fixed_K8.raw_labels"])
    assert fit.iterations == recorded["fixed_K8.n_iter"]
    torch.testing.assert_close(fit.centers, recorded["fixed_K8.raw_centroids"], rtol=0, atol=1e-6)
    labels, order = released.first_occurrence(fit.labels, 8)
    assert torch.equal(labels.view(4, 49), recorded["fixed_K8.index_map"])
    codes = released.code_means_2026(tokens, labels, fit.centers[order])
    torch.testing.assert_close(codes, recorded["fixed_K8.codebook"], rtol=0, atol=1e-6)
    as_fitted = released.code_means_2026(tokens, fit.labels, fit.centers)
    assert torch.equal(fit.labels.view(4, 49), recorded["fixed_K8_nocanon.index_map"])
    torch.testing.assert_close(as_fitted, recorded["fixed_K8_nocanon.codebook"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_of_2026(recorded: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    tokens = recorded["tokens"].flatten(0, 1).to(dtype)
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
    fit = released.kmeans_2026(tokens, unit[recorded["fixed_K8.init_idx"]])
    labels, order = released.first_occurrence(fit.labels, 8)
    assert torch.equal(labels.view(4, 49), recorded[f"fixed_K8_{name}.index_map"])
    codes = released.code_means_2026(tokens, labels, fit.centers[order])
    assert codes.dtype == dtype
    torch.testing.assert_close(codes, recorded[f"fixed_K8_{name}.codebook"], rtol=0, atol=1e-6)


def test_scores_and_elbow_of_2026(recorded: dict[str, Tensor]) -> None:
    tokens = recorded["tokens"].flatten(0, 1)
    fit = released.Fit(recorded["fixed_K8.raw_labels"].flatten(), recorded["fixed_K8.raw_centroids"], 0)
    distortions, scores = recorded["elbow_4_20.trace"], recorded["silhouette_4_20.trace"]
    assert released.distortion_2026(tokens, fit) == pytest.approx(float(distortions[8 - 4]), rel=1e-5)
    assert released.silhouette_2026(tokens, fit.labels) == pytest.approx(float(scores[8 - 4]), abs=1e-6)
    labels = recorded["silhouette_4_20.index_map"].flatten()
    assert released.silhouette_2026(tokens, labels) == pytest.approx(float(scores[5 - 4]), abs=1e-6)
    assert released.elbow_2026(distortions.tolist(), 4) == recorded["elbow_4_20.best_K"]
    assert int(scores.argmax()) + 4 == recorded["silhouette_4_20.best_K"]


def test_attention_with_the_published_weights(reference: Path) -> None:
    tensors = load_file(reference / "vqtoken" / "vqattn_small.safetensors")
    prefix = "model.cross_attention."
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    attention = ReleasedVQAttention(64, 8, 2048, 49).eval()
    assert len(weights) == 20
    attention.load_state_dict(weights)
    with torch.no_grad():
        for case in ("T4K9", "T6K6", "T9K4"):
            out = attention(tensors[f"{case}.index_map"], tensors[f"{case}.codebook"])
            torch.testing.assert_close(out, tensors[f"{case}.output"], rtol=0, atol=2e-5)


def plain_2025(tokens: Tensor, centers: Tensor, iterations: int) -> tuple[list[int], Tensor]:
    """The published loop over clusters; what comes back is from before the last update."""
    x = tokens / tokens.norm(dim=1, keepdim=True)
    for step in range(iterations):
        sims = [[float(a @ c / c.norm()) for c in centers] for a in x]
        labels = [row.index(max(row)) for row in sims]
        new = centers.clone()
        for k in range(len(centers)):
            if k in labels:
                new[k] = x[[i for i, label in enumerate(labels) if label == k]].mean(0)
        if float((centers - new).norm()) < 1e-4 or step == iterations - 1:
            return labels, centers
        centers = new
    raise AssertionError


@pytest.mark.parametrize("iterations", [1, 2, 3, 60])
def test_the_fit_of_2025_is_one_step_stale(iterations: int) -> None:
    tokens = mixture(5, 60, width=8, spread=0.8)[0]
    start = torch.cat([torch.nn.functional.normalize(tokens[:4], dim=1), -10 * tokens.mean(0, keepdim=True)])
    labels, centers = plain_2025(tokens, start, iterations)
    fit = released.kmeans_2025(tokens, start, iterations)
    assert fit.labels.tolist() == labels
    torch.testing.assert_close(fit.centers, centers, rtol=0, atol=1e-6)
    newer = released.kmeans_2026(tokens, start, iterations)
    assert iterations > 3 or not torch.allclose(newer.centers, fit.centers, atol=1e-4)


def test_a_token_of_length_zero_spoils_the_fit_of_2025_only() -> None:
    tokens = noise(0, 20, 4)
    tokens[3] = 0
    start = torch.nn.functional.normalize(tokens[:2], dim=1)
    assert released.kmeans_2025(tokens, start, 5).centers.isnan().any()
    assert not released.kmeans_2026(tokens, start, 5).centers.isnan().any()


def test_the_elbow_of_2025_reads_the_wrong_index() -> None:
    distortions = [100.0 - 5 * k for k in range(21)]
    for bend in range(1, 20):  # the true elbow is K = 12 + bend
        bent = [d if k <= bend else d + 4 * (k - bend) for k, d in enumerate(distortions)]
        assert released.elbow_2025(bent) == max(12, bend + 3)
        assert released.elbow_2026(bent, 12) == 12 + bend
    assert released.silhouette_2025(range(12, 33)) == 12


def test_seeds_of_2026_stay_distinct_and_survive_equal_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    assert len(released.seeds_2026(noise(0, 30, 4), 30, generator).unique()) == 30
    assert released.seeds_2026(torch.ones(5, 3), 3, generator).shape == (3,)
    assert torch.equal(
        released.fit_2026(noise(1, 40, 4), 5, seed=7).labels, released.fit_2026(noise(1, 40, 4), 5, seed=7).labels
    )


def test_the_search_of_2026_takes_the_best_of_its_own_fits() -> None:
    tokens = mixture(6, 120, width=32, spread=0.1)[0]
    assert len(released.search_2026(tokens, 2, 12, "silhouette", 3).centers) == 6
    assert len(released.search_2026(tokens[:5], 4, 9, "silhouette", 3).centers) == 4
    assert len(released.search_2026(tokens, 2, 3, "elbow", 3).centers) == 2
