"""Karl keeps the contract of every model, and the laws of token budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model_contract import ModelContract, Outputs
from tests.multimodal.budget_strategies import budgets
from tests.tokenizers.karl.tiny_karl import SIZE, TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.budget import BudgetError, ItemSize, TokenBudget
from tokenthrift.hub import HubModel
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.model import EncodedLatents, Karl
from tokenthrift.tokens import TokenBatch


class KarlContract(ModelContract):
    """Items are an image and how many tokens it has."""

    kind: ClassVar[Any]
    codes: ClassVar[int | None]

    def build(self) -> HubModel:
        return Karl(tiny_config(self.kind, self.codes))

    def items(self) -> list[Any]:
        return list(zip(pictures(3), (5, TOKENS, 2), strict=True))

    def encode_latents(self, model: Karl, items: list[Any]) -> tuple[EncodedLatents, Tensor]:
        images = torch.stack([image for image, _ in items]).to(model.to_tokens.weight)
        counts = torch.tensor([count for _, count in items])
        features = model.base.encode(images)
        errors = 0.02 * counts.float()
        return model.encode_latents(images, features, counts, errors), features

    def outputs(self, model: Any, items: list[Any]) -> Outputs:
        found, _ = self.encode_latents(model, items)
        parts = [[found.halting_logits, found.tokens], [n for _, n in items]]
        rows = [[part[i, :n] for part in parts[0]] for i, n in enumerate(parts[1])]
        if self.codes is None:
            # A code is a decision: in half precision another may win, and the pictures are then rightly different.
            output = model.decode_latents(found.tokens, found.mask)
            images = model.base.decode(model.to_features(output))
            rows = [[*row, output[i], images[i]] for i, row in enumerate(rows)]
        return rows

    def shapes(self, model: Any, item: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = [(item[1],), (item[1], 12)]
        if self.codes is None:
            shapes += [(24, model.config.base.outputs), (3, *SIZE)]
        return shapes

    def loss(self, model: Any, items: list[Any]) -> Tensor:
        found, features = self.encode_latents(model, items)
        quantized = model.quantize(found.tokens, found.mask)
        output = model.decode_latents(quantized.values, found.mask)
        target = model.base.to_targets(features)
        if self.kind == "vqgan":
            reconstruction = F.cross_entropy(output.flatten(0, 1), target.flatten())
        else:
            reconstruction = F.mse_loss(output, target) / target.var()
        wanted = (torch.arange(found.mask.shape[1]) % 2).float().expand_as(found.halting_logits)
        halting = F.binary_cross_entropy_with_logits(found.halting_logits[found.mask], wanted[found.mask])
        loss: Tensor = reconstruction + halting + quantized.loss
        return loss


class TestQuantisedOnVqgan(KarlContract):
    kind = "vqgan"
    codes = 32
    steps = 60


class TestContinuousOnVae(KarlContract):
    kind = "vae"
    codes = None
    learned = 0.7
    steps = 60


MODEL = tiny_karl(decisive=True)
CONTINUOUS = tiny_karl(tiny_config("vae", None), decisive=True)
IMAGES = pictures(4)


def asked(error: float | None) -> st.SearchStrategy[TokenBudget]:
    """Budgets with this wanted error."""
    return budgets(seconds=False).map(lambda budget: replace(budget, target_error=error))


wishes = st.sampled_from([None, 0.01, 0.05, 0.123, 0.38]).flatmap(asked)


def row(tokens: TokenBatch, i: int) -> list[Tensor]:
    """What one image of a batch has, without padding."""
    keep = tokens.mask[i]
    return [part[i][keep] for part in (tokens.embeddings, tokens.positions, tokens.codes) if part is not None]


@settings(deadline=None, max_examples=10)
@given(st.lists(wishes, min_size=4, max_size=4))
def test_used_is_at_most_the_cap_and_the_plan(wanted: list[TokenBudget]) -> None:
    tokens = MODEL.encode(IMAGES, wanted)
    plan = MODEL.plan([ItemSize()] * 4, wanted)
    assert tokens.mask.sum(1).tolist() == [usage.used for usage in tokens.usage]
    for usage, planned, budget in zip(tokens.usage, plan, wanted, strict=True):
        cap = planned.cap
        assert (planned.native, planned.used) == (TOKENS, cap)
        assert usage.used <= usage.cap == cap <= min(usage.native, budget.max_tokens or TOKENS)
        assert usage.used >= min(budget.min_tokens, cap)
        if budget.target_error is None:
            assert usage.used == cap


@settings(deadline=None, max_examples=10)
@given(st.lists(wishes, min_size=4, max_size=4))
def test_an_image_of_a_batch_has_the_tokens_of_the_image_alone(wanted: list[TokenBudget]) -> None:
    for model in (MODEL, CONTINUOUS):
        together = model.encode(IMAGES, wanted)
        images = model.decode(together)
        for i, budget in enumerate(wanted):
            alone = model.encode(IMAGES[i : i + 1], budget)
            (values, *exact), (values_alone, *exact_alone) = row(together, i), row(alone, 0)
            assert all(torch.equal(a, b) for a, b in zip(exact, exact_alone, strict=True))
            torch.testing.assert_close(values, values_alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.decode(alone)[0], images[i], rtol=0, atol=1e-5)


def test_codes_and_counts_do_not_depend_on_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code has a twin a hair away, and features of a batch are rounded otherwise than those of one image."""
    model = tiny_karl(decisive=True)
    assert model.quantizer is not None
    images, noise = pictures(8), torch.randn(8, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        book = F.normalize(model.quantizer.codebook, dim=-1)
        book[1::2] = book[::2] + 1e-6 * book[1::2]
        model.quantizer.codebook.copy_(book)
    encode, passes = Vqgan.encode, list[tuple[int, torch.dtype]]()

    def rounded(self: Vqgan, batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        passes.append((len(batch), batch.dtype))
        off = 1e-6 * noise if len(batch) == 8 and batch.dtype == torch.float32 else 0
        return encode(self, batch, generator) + off

    monkeypatch.setattr(Vqgan, "encode", rounded)
    alone = [model.encode(images[i : i + 1], "e0.05") for i in range(8)]

    def same() -> bool:
        together = model.encode(images, "e0.05")
        return all(torch.equal(a, b) for i in range(8) for a, b in zip(row(together, i), row(alone[i], 0), strict=True))

    passes.clear()
    assert same()
    assert passes == [(8, torch.float32), (8, torch.float64)], "one batch for all that are close"
    monkeypatch.setattr("tokenthrift.karl.model.CLOSE_COSINE", 0.0)
    assert not same()


def test_only_close_decisions_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A halting logit near the threshold behind the end of the image, or within its floor, decides nothing."""
    model = tiny_karl(tiny_config("vae", None), decisive=True)
    exact: list[int] = []
    encode = AutoencoderKL.encode

    def spy(self: AutoencoderKL, batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        exact.extend([len(batch)] * (batch.dtype == torch.float64))
        return encode(self, batch, generator)

    monkeypatch.setattr(AutoencoderKL, "encode", spy)
    edge = math.log(model.config.halting_threshold / (1 - model.config.halting_threshold))
    logits = torch.full((4, TOKENS), -5.0)
    logits[:, 6], logits[:, 9] = 5.0, edge

    class Head(torch.nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return logits[: len(latents), : latents.shape[1]].to(latents)

    model.halting = Head()  # type: ignore[assignment]
    assert [usage.used for usage in model.encode(IMAGES, "e0.05").usage] == [6] * 4
    assert [usage.used for usage in model.encode(IMAGES).usage] == [TOKENS] * 4
    assert exact == []
    logits[1, 3] = edge
    model.encode(IMAGES, "e0.05")
    assert exact == [1]
    model.encode(IMAGES, TokenBudget(target_error=0.05, min_tokens=6))
    assert exact == [1]
    model.encode(IMAGES, "e0.05", torch.Generator().manual_seed(0))
    assert exact == [1], "latents that were drawn belong to their batch"


@settings(deadline=None, max_examples=10)
@given(wishes, st.integers(1, TOKENS), st.integers(1, TOKENS))
def test_n_tokens_are_the_first_n_of_m(budget: TokenBudget, n: int, m: int) -> None:
    assert MODEL.support.nested
    fewer, more = sorted((n, m))
    few, many = (
        MODEL.encode(IMAGES, TokenBudget(max_tokens=k, target_error=budget.target_error)) for k in (fewer, more)
    )
    for i in range(len(IMAGES)):
        (values, positions, codes), (all_values, all_positions, all_codes) = row(few, i), row(many, i)
        assert positions.tolist() == all_positions[: len(positions)].tolist() == list(range(len(positions)))
        assert len(positions) == min(fewer, len(all_positions))
        assert torch.equal(codes, all_codes[: len(codes)])
        torch.testing.assert_close(values, all_values[: len(values)], rtol=0, atol=1e-5)


@given(budgets(seconds=False), st.integers(1, TOKENS))
def test_a_looser_budget_never_lowers_the_cap(budget: TokenBudget, more: int) -> None:
    looser = replace(budget, max_tokens=None if budget.max_tokens is None else budget.max_tokens + more)
    assert MODEL.plan([TOKENS], looser)[0].cap >= MODEL.plan([TOKENS], budget)[0].cap


def test_the_wanted_error_changes_how_many_are_kept_and_more_is_asked_for_in_one_call() -> None:
    counts = {e: [u.used for u in MODEL.encode(IMAGES, f"e{e}").usage] for e in (0.005, 0.05, 0.38)}
    assert len({tuple(used) for used in counts.values()}) > 1
    assert any(0 < used < TOKENS for row in counts.values() for used in row)
    both = MODEL.encode(IMAGES, "3,e0.05").usage
    assert [usage.used for usage in both] == [min(3, used) for used in counts[0.05]]


def test_a_floor_is_kept_against_the_halting() -> None:
    free = [usage.used for usage in MODEL.encode(IMAGES, "e0.05").usage]
    floored = MODEL.encode(IMAGES, TokenBudget(target_error=0.05, min_tokens=7)).usage
    assert [usage.used for usage in floored] == [max(7, used) for used in free]
    assert min(free) < 7


def test_no_tokens_at_all_are_still_an_image() -> None:
    tokens = MODEL.encode(IMAGES, TokenBudget(retention=0.01, min_tokens=0))
    assert [usage.used for usage in tokens.usage] == [0] * 4
    assert MODEL.decode(tokens).shape == IMAGES.shape


def test_tokens_and_their_codes_make_the_same_image() -> None:
    tokens = MODEL.encode(IMAGES, [2, 5, 12, 1])
    assert tokens.codes is not None
    stored = [codes[keep].tolist() for codes, keep in zip(tokens.codes, tokens.mask, strict=True)]
    again = MODEL.from_codes(stored)
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert torch.equal(MODEL.decode(again), MODEL.decode(tokens))
    assert [usage.used for usage in again.usage] == [2, 5, 12, 1]


def test_padding_on_the_left_and_what_it_holds_change_nothing() -> None:
    tokens = MODEL.encode(IMAGES, [2, 5, 12, 1])
    flipped = replace(
        tokens,
        embeddings=tokens.embeddings.masked_fill(~tokens.mask[..., None], float("nan")).flip(1),
        mask=tokens.mask.flip(1),
        positions=tokens.positions.flip(1),
        codes=None,
    )
    torch.testing.assert_close(MODEL.decode(flipped), MODEL.decode(tokens), rtol=0, atol=1e-5)


def test_the_vae_draws_its_latents_only_where_asked() -> None:
    mean = CONTINUOUS.encode(IMAGES).embeddings
    drawn = [CONTINUOUS.encode(IMAGES, None, torch.Generator().manual_seed(s)).embeddings for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(CONTINUOUS.encode(IMAGES).embeddings, mean)


def test_what_is_not_honoured_raises() -> None:
    for budget, message in (
        ("12/s", "tokens_per_second"),
        (TokenBudget(retention=0.1, min_tokens=5), "leaves 1 of 12"),
    ):
        with pytest.raises(BudgetError, match=message):
            MODEL.encode(IMAGES, budget)
    with pytest.raises(ValueError, match="4 items"):
        MODEL.encode(IMAGES, [3, 4])


def test_full_attention_and_subsets_are_not_nested() -> None:
    published = tiny_config(latent_attention="full", halting="subset")
    assert not Karl(published).support.nested
    positions = tiny_karl(published, decisive=True).encode(IMAGES, "e0.05").positions
    assert positions.tolist() != torch.arange(positions.shape[1]).expand_as(positions).tolist()
