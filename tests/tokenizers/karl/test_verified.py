"""Verified encoding: what is called met was measured, passes are bounded, and caps hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.budget import BudgetError, BudgetLike, BudgetSupport, TokenBudget, TokenUsage
from tokenthrift.karl.calibration import Calibration
from tokenthrift.karl.model import Karl
from tokenthrift.karl.verified import bisect, encode_verified, encoder_passes, measure, verdict
from tokenthrift.tokens import TokenBatch

CURVES = st.lists(st.lists(st.floats(0, 1), min_size=17, max_size=17), min_size=1, max_size=5)


@pytest.fixture(scope="module", params=["nested", "subset"])
def karl(request: pytest.FixtureRequest) -> Karl:
    if request.param == "nested":
        return tiny_karl(decisive=True)
    return tiny_karl(tiny_config(latent_attention="full", halting="subset"), decisive=True)


@settings(max_examples=60, deadline=None)
@given(CURVES, st.floats(0, 1), st.integers(1, 7), st.booleans())
def test_bisection(curves: list[list[float]], wanted: float, passes: int, monotone: bool) -> None:
    if monotone:
        curves = [sorted(curve, reverse=True) for curve in curves]
    seen: list[list[int]] = [[] for _ in curves]

    def errors(counts: Sequence[int], chosen: Sequence[int]) -> list[float]:
        for i, n in zip(chosen, counts, strict=True):
            seen[i].append(n)
        return [curves[i][n] for i, n in zip(chosen, counts, strict=True)]

    count, reached, spent = bisect(errors, [0] * len(curves), [16] * len(curves), [wanted] * len(curves), passes)
    for i, curve in enumerate(curves):
        assert reached[i] == curve[count[i]]
        assert count[i] in seen[i]
        assert spent[i] == len(seen[i]) <= passes
        # Met wherever all tokens meet it; and exact where errors fall and passes suffice.
        assert (reached[i] <= wanted) == (curve[16] <= wanted)
        if monotone and passes >= 6 and reached[i] <= wanted:
            assert count[i] == 1 or curve[count[i] - 1] > wanted


class Stripes:
    """A tokenizer whose errors can be foretold: a token is a row of pixels, and what has no token is gray.

    One pass always keeps four, so that contrasty images miss.
    """

    def __init__(self, nested: bool) -> None:
        self.support = BudgetSupport(fields=frozenset({"max_tokens", "target_error"}), nested=nested, adaptive=True)

    def encode(
        self, pictures: Tensor, budgets: Sequence[TokenBudget], *, calibrated: bool = False, features: None = None
    ) -> TokenBatch:
        caps = [budget.cap(TOKENS) for budget in budgets]
        used = [c if b.target_error is None else min(4, c) for b, c in zip(budgets, caps, strict=True)]
        tokens = TokenBatch.from_items(
            [image.permute(1, 0, 2).flatten(1)[:n] for image, n in zip(pictures, used, strict=True)]
        )
        usage = (TokenUsage(native=TOKENS, cap=c, used=n) for c, n in zip(caps, used, strict=True))
        return replace(tokens, usage=tuple(usage))

    def decode(self, tokens: TokenBatch, size: tuple[int, int]) -> Tensor:
        pictures = torch.full((len(tokens.mask), 3, *size), 0.5)
        for picture, item in zip(pictures, tokens.items(), strict=True):
            picture[:, : len(item)] = item.unflatten(1, (3, -1)).permute(1, 0, 2)
        return pictures


@pytest.mark.parametrize("nested", [True, False])
def test_what_is_called_met_is_met(nested: bool) -> None:
    karl, wanted = cast(Karl, Stripes(nested)), 0.06
    shown = pictures(12, (TOKENS, TOKENS))
    budgets = [TokenBudget(target_error=wanted, max_tokens=cap) for cap in [TOKENS] * 6 + [6] * 4 + [2] * 2]
    tokens = encode_verified(karl, shown, budgets)
    verdicts = set()
    for i, (usage, budget) in enumerate(zip(tokens.usage, budgets, strict=True)):
        at = [(shown[i] - 0.5).abs()[:, n:].sum().item() / shown[i].numel() for n in range(TOKENS + 1)]
        cap = budget.max_tokens or 0
        enough = [n for n in range(min(4, cap), cap + 1) if at[n] <= wanted]
        assert usage.used == (enough[0] if enough else cap)
        assert usage.error == pytest.approx(at[usage.used], abs=1e-5)
        assert verdict(usage, budget) == ("met" if enough else "best_effort")
        assert (usage.rounds == 1) == (at[min(4, cap)] <= wanted)
        assert usage.rounds <= 6
        assert usage.used == int(tokens.mask[i].sum())
        verdicts.add((verdict(usage, budget), usage.rounds > 1))
    assert verdicts >= {("met", False), ("met", True), ("best_effort", True)}


def test_one_pass_only_measures() -> None:
    karl = cast(Karl, Stripes(True))
    shown = pictures(6, (TOKENS, TOKENS))
    budgets = [TokenBudget(target_error=0.06)] * 6
    tokens = encode_verified(karl, shown, budgets, passes=1)
    assert [(usage.used, usage.rounds) for usage in tokens.usage] == [(4, 1)] * 6


def test_verified_tokens_are_those_of_the_image_alone(karl: Karl) -> None:
    shown = pictures(4, seed=3)
    wanted = measure(karl, shown, karl.encode(shown)).quantile(0.5).item()
    together = encode_verified(karl, shown, f"e{wanted}")
    for i in range(4):
        alone = encode_verified(karl, shown[i : i + 1], f"e{wanted}")
        assert alone.usage[0].used == together.usage[i].used
        assert together.codes is not None
        assert alone.codes is not None
        assert torch.equal(together.codes[i][together.mask[i]], alone.codes[0])


def test_verification_needs_a_target(karl: Karl) -> None:
    budgets: list[BudgetLike | list[BudgetLike]] = [4, None, ["e0.1", 4]]
    for budget in budgets:
        with pytest.raises(BudgetError, match="target_error"):
            encode_verified(karl, pictures(2), budget)
    with pytest.raises(ValueError, match="verdict"):
        verdict(karl.encode(pictures(1), 4).usage[0], TokenBudget())


def test_an_image_that_may_have_no_token_is_best_effort(karl: Karl) -> None:
    none = TokenBudget(retention=0.01, min_tokens=0, target_error=1e-6)
    some = TokenBudget(max_tokens=3, target_error=1e-6)
    tokens = encode_verified(karl, pictures(3), [none, some, none])
    assert [(usage.cap, usage.used, usage.rounds) for usage in tokens.usage][::2] == [(0, 0, 1)] * 2
    assert tokens.usage[1].rounds > 1
    assert [verdict(usage, none) for usage in tokens.usage] == ["best_effort"] * 3


def test_encoder_passes_are_those_that_are_stated(karl: Karl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is encoded twice at one count."""
    shown = pictures(1, seed=3)
    passes: list[int] = []
    monkeypatch.setattr("tokenthrift.karl.model.CLOSE_COSINE", -1.0)
    monkeypatch.setattr("tokenthrift.karl.model.CLOSE_LOGIT", -1.0)
    hook = karl.encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    # Errors of random weights do not fall with the count; these do, and one pass misses all but the last.
    monkeypatch.setattr(
        "tokenthrift.karl.verified.measure", lambda karl, images, tokens: 1.0 / (1 + tokens.mask.sum(1))
    )
    monkeypatch.setattr(
        "tokenthrift.karl.model.kept", lambda logits, mask, least, **_: mask & (mask.cumsum(1) <= least[:, None])
    )
    rounds = set()
    for wanted in (0.01, 0.08, 0.2, 0.6):
        passes.clear()
        (usage,) = encode_verified(karl, shown, TokenBudget(target_error=wanted)).usage
        rounds.add(usage.rounds)
        assert len(passes) == encoder_passes(usage.rounds, karl.support.nested)
    hook.remove()
    assert {1, 2} < rounds, "searches too"


def test_a_floor_is_kept() -> None:
    karl = tiny_karl(decisive=True)
    budget = TokenBudget(target_error=1e-6, min_tokens=5, max_tokens=9)
    assert all(5 <= usage.used <= 9 for usage in encode_verified(karl, pictures(3), budget).usage)


def test_latents_are_drawn_once() -> None:
    """Misses are encoded again from the latents that were drawn for them, not from other ones or their mean."""
    karl, shown = tiny_karl(tiny_config("vae", None), decisive=True), pictures(3)
    drawn = [karl.encode(shown, None, torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    tokens = encode_verified(karl, shown, "e0.000001", torch.Generator().manual_seed(5))
    assert any(usage.rounds > 1 for usage in tokens.usage)
    refined = [i for i, usage in enumerate(tokens.usage) if usage.used == TOKENS]
    assert refined
    for i in refined:
        assert torch.equal(tokens.embeddings[i], drawn[0].embeddings[i])
        assert not torch.equal(tokens.embeddings[i], drawn[1].embeddings[i])
        assert not torch.equal(tokens.embeddings[i], karl.encode(shown).embeddings[i])


def test_a_batch_is_as_wide_as_its_longest_image() -> None:
    """Also where another image was encoded with more tokens on the way."""
    karl = cast(Karl, Stripes(True))
    shown = pictures(4, (TOKENS, TOKENS))
    tokens = encode_verified(karl, shown, "e0.06")
    assert tokens.mask.shape[1] == max(usage.used for usage in tokens.usage) < TOKENS


def test_calibrated_encoding_is_conditioned_on_less() -> None:
    calibration = Calibration(alpha=0.1, images=50, tokens=TOKENS, requests=(0.02, 0.1), bounds=(0.05, 0.3))
    karl = tiny_karl(tiny_config(calibration=calibration), decisive=True)
    shown = pictures(4)
    tokens = karl.encode(shown, "e0.2", calibrated=True)
    same = karl.encode(shown, "e0.02")
    assert torch.equal(tokens.positions, same.positions)
    with pytest.raises(BudgetError, match="for all but 10%"):
        karl.encode(shown, "e0.04", calibrated=True)
    with pytest.raises(BudgetError, match=f"caps from {TOKENS}"):
        karl.encode(shown, "4,e0.2", calibrated=True)
    with pytest.raises(BudgetError, match="without target_error"):
        karl.encode(shown, calibrated=True)
    karl.config = replace(karl.config, calibration=None)
    with pytest.raises(BudgetError, match="with a calibration"):
        karl.encode(shown, "e0.2", calibrated=True)
