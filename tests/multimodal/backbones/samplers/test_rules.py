"""Commit rules and scores: the published one-step results, and what holds for any confidences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.multimodal.backbones.samplers.stub_models import EOS, MASK, case
from tokenthrift.backbones.samplers import TokenIds
from tokenthrift.backbones.samplers.rules import (
    best,
    by_entropy,
    by_factor,
    by_quota,
    by_row_threshold,
    by_threshold,
    quotas,
    time_quotas,
)
from tokenthrift.backbones.samplers.scores import Scoring, entropy, guide, score, uniform

TOKENS = TokenIds(MASK, EOS, eot=45)


def test_published_one_step_results_of_fast_dllm(reference: Path) -> None:
    _, arrays = case(reference / "dllm", "fast_commit_rules")
    open_slots, sure = arrays["mask"], arrays["conf"]
    token, confidence = score(arrays["logits"][open_slots], TOKENS, Scoring(mask_token="allow"))
    assert token.tolist() == arrays["x0"][open_slots].tolist()
    torch.testing.assert_close(confidence, sure[open_slots], rtol=0, atol=1e-12)
    for threshold in (0.5, 0.8, 0.9, 0.95):
        assert torch.equal(by_threshold(sure, open_slots, threshold), arrays[f"thr{threshold}"])
    three = torch.full((len(sure),), 3)
    assert torch.equal(by_quota(sure, open_slots, three), arrays["quota3"])
    for factor in (0.5, 1.0, 2.0):
        assert torch.equal(by_factor(sure, open_slots, factor, last_rank=True), arrays[f"factor{factor}"])
        assert torch.equal(by_factor(sure, open_slots, factor), arrays[f"factor{factor}_dllmlib"])
    assert not torch.equal(arrays["factor1.0"], arrays["factor1.0_dllmlib"])


def random_case(seed: int, rows: int = 3, slots: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sure = torch.randint(0, 4, (rows, slots), generator=generator) / 3  # many ties
    wild = torch.rand(rows, slots, generator=generator)
    sure = sure.masked_fill(wild < 0.1, torch.nan).masked_fill(wild > 0.9, -torch.inf)
    return sure, torch.rand(rows, slots, generator=generator) < 0.6


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_every_rule_commits_open_slots_and_at_least_one(seed: int) -> None:
    sure, open_slots = random_case(seed)
    chosen = {
        "best": best(sure, open_slots),
        "threshold": by_threshold(sure, open_slots, 0.9),
        "strict": by_threshold(sure, open_slots, 1.0, strict=True),
        "row": by_row_threshold(sure, open_slots, 0.9),
        "factor": by_factor(sure, open_slots, 1.0),
        "published factor": by_factor(sure, open_slots, 1.0, last_rank=True),
        "entropy": by_entropy(-sure, open_slots, 0.1),
        "quota": by_quota(sure, open_slots, torch.tensor([1, 2, 9])),
    }
    for name, slots in chosen.items():
        assert not (slots & ~open_slots).any(), name
        assert torch.equal(slots.any(1), open_slots.any(1)), name
    assert (chosen["best"].sum(1) <= 1).all()
    assert (chosen["quota"].sum(1) == torch.minimum(open_slots.sum(1), torch.tensor([1, 2, 9]))).all()


@settings(deadline=None, max_examples=60)
@given(masked=st.integers(0, 300), steps=st.integers(1, 80))
def test_quotas_spend_exactly_what_is_masked(masked: int, steps: int) -> None:
    plan = quotas(torch.tensor([masked]), steps)[0].tolist()
    assert sum(plan) == masked
    assert plan == sorted(plan, reverse=True)
    assert max(plan) - min(plan) <= 1
    assert sum(time_quotas(masked, steps)) == masked


def test_equally_sure_slots_are_taken_from_the_left() -> None:
    sure, open_slots = torch.full((1, 5), 0.5), torch.tensor([[False, True, True, False, True]])
    assert by_quota(sure, open_slots, torch.tensor([2]))[0].tolist() == [False, True, True, False, False]


def test_row_threshold_follows_the_row() -> None:
    sure, every = torch.tensor([[0.5, 0.499999, 0.3], [0.95, 0.91, 0.2]]), torch.ones(2, 3, dtype=torch.bool)
    assert by_row_threshold(sure, every, 0.9).tolist() == [[True, True, False], [True, True, False]]
    assert by_threshold(sure, every, 0.9).tolist() == [[True, False, False], [True, True, False]]


def test_entropy_bound_counts_the_slots_before() -> None:
    nats, every = torch.tensor([[0.3, 0.05, 0.06, 0.5]]), torch.ones(1, 4, dtype=torch.bool)
    assert by_entropy(nats, every, 0.1)[0].tolist() == [False, True, True, False]
    assert by_entropy(nats, every, 0.11)[0].tolist() == [True, True, True, False]
    assert by_entropy(nats, every, 0.0)[0].tolist() == [False, True, False, False]
    left_first = by_entropy(nats, every, 0.1, order_by=torch.arange(4.0)[None])
    assert left_first[0].tolist() == [True, False, False, False]


def test_entropy_of_impossible_tokens_is_nothing() -> None:
    assert float(entropy(torch.tensor([0.0, 0.0, -torch.inf]))) == pytest.approx(0.6931, abs=1e-4)


def logits_of(**values: float) -> Tensor:
    logits = torch.zeros(1, 48)
    for name, value in values.items():
        logits[0, int(name[1:])] = value
    return logits


def test_mask_as_a_candidate() -> None:
    logits = logits_of(t47=5.0, t3=4.0)
    p = logits.double().softmax(-1)[0]
    token, sure = score(logits, TOKENS, Scoring())
    assert int(token) == 3
    assert float(sure) == pytest.approx(float(p[3] / (1 - p[47])))
    token, sure = score(logits, TOKENS, Scoring(mask_token="allow"))
    assert int(token) == 47
    assert float(sure) == pytest.approx(float(p[47]))
    token, sure = score(logits, TOKENS, Scoring(mask_token="skip"))
    assert (int(token), float(sure)) == (47, -torch.inf)


def test_end_of_text_options() -> None:
    logits = logits_of(t46=5.0, t3=4.0, t45=3.0)
    assert int(score(logits, TOKENS, Scoring(logits_eos_inf=True))[0]) == 3
    token, sure = score(logits, TOKENS, Scoring(confidence_eos_eot_inf=True))
    assert (int(token), float(sure)) == (46, 0.0)
    noise = torch.full((1, 48), 0.5, dtype=torch.float64)
    noisy = Scoring(confidence_eos_eot_inf=True, temperature=1.0)
    assert float(score(logits, TOKENS, noisy, noise)[1]) == 0.0
    published = Scoring(confidence_eos_eot_inf=True, temperature=1.0, eos_noise_quirk=True)
    assert float(score(logits, TOKENS, published, noise)[1]) > 0.5


def test_noise_draws_from_the_softmax_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 800.0]])  # the exponential of the last one overflows
    many = logits.expand(4000, -1)
    noise = torch.rand(4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, sure = score(many, TokenIds(3, 0), Scoring(temperature=1.0), noise)
    share = token.bincount(minlength=4) / 4000
    torch.testing.assert_close(share[:3], logits[0, :3].softmax(-1), atol=0.03, rtol=0)
    assert share[3] == 0
    assert set(sure.unique().tolist()) == set(logits[0, :3].double().softmax(-1).tolist())


def test_other_confidences() -> None:
    logits = logits_of(t3=4.0, t7=3.0)
    p = logits.double().clone()
    p[:, 47] = -torch.inf
    p = p.softmax(-1)[0]
    margin = score(logits, TOKENS, Scoring(remasking="margin"))[1]
    assert float(margin) == pytest.approx(float(p[3] - p[7]))
    assert float(score(logits, TOKENS, Scoring(remasking="entropy"))[1]) < 0
    random = torch.tensor([0.25])
    assert float(score(logits, TOKENS, Scoring(remasking="random"), random=random)[1]) == 0.25


def test_guidance_moves_away_from_the_free_prediction() -> None:
    both = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]]])
    assert guide(both, 0.0).tolist() == [[[2.0, 0.0]]]
    assert guide(both, 1.0).tolist() == [[[3.0, -1.0]]]


def test_a_row_with_a_generator_of_its_own_draws_what_it_draws_alone() -> None:
    def draw(rows: list[int], lengths: list[int], width: int) -> Tensor:
        own = [torch.Generator().manual_seed(seed) for seed in range(3)]
        shape = (len(rows), width, 2)
        device = torch.device("cpu")
        return uniform(own, torch.tensor(rows), torch.tensor(lengths), shape, torch.float64, device)

    together = draw([0, 2], [3, 5], 5)
    assert torch.equal(together[0, :3], draw([0], [3], 3)[0])
    assert torch.equal(together[1], draw([2], [5], 5)[0])
