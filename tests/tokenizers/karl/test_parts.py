"""Packing, halting and the token codebook."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers.karl.tiny_karl import TOKENS, tiny_karl
from tokenthrift.karl.halting import halting_margin, kept
from tokenthrift.karl.latent.packing import groups
from tokenthrift.karl.latent.transformer import causal_latents
from tokenthrift.karl.quantizer import CosineQuantizer
from tokenthrift.padding import length_mask

masks = st.lists(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS), min_size=1, max_size=5).map(torch.tensor)


@settings(deadline=None, max_examples=20)
@given(masks)
@torch.no_grad()
def test_packed_equals_masked(keep: torch.Tensor) -> None:
    """The published way, all positions computed under a mask, gives the same output."""
    model = tiny_karl()
    values = torch.randn(*keep.shape, 12, generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(TOKENS).expand_as(keep)
    masked = model.decoder(values, everywhere, keep, (4, 6))
    torch.testing.assert_close(model.decode_latents(values, keep), masked, rtol=0, atol=1e-5)


@given(st.lists(st.integers(0, 512), max_size=20), st.integers(1, 1024))
def test_groups_hold_every_row_once_with_little_padding(counts: list[int], fixed: int) -> None:
    found = groups(counts, fixed)
    assert sorted(row for rows in found for row in rows) == list(range(len(counts)))
    for rows in found:
        longest = fixed + counts[rows[0]]
        assert longest == max(fixed + counts[row] for row in rows)
        padding = sum(longest - fixed - counts[row] for row in rows)
        assert padding <= 0.02 * longest * len(rows)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), st.integers(0, 20), st.booleans(), st.floats(0, 1)
)
def test_halting(logits: list[float], least: int, prefix: bool, threshold: float) -> None:
    omega = torch.tensor([logits])
    mask = torch.arange(len(logits))[None] < max(1, len(logits) - 2)
    keep = kept(omega, mask, threshold=threshold, prefix=prefix, least=least)
    assert not (keep & ~mask).any()
    assert int(keep.sum()) >= min(least, int(mask.sum()))
    wanted = mask & (omega.sigmoid() <= threshold)
    if prefix:
        first = next((i for i, stays in enumerate(wanted[0].tolist()) if not stays), len(logits))
        assert keep[0].tolist() == [i < max(first, min(least, int(mask.sum()))) for i in range(len(logits))]
    else:
        assert (keep & wanted).equal(wanted)
        extra, dropped = omega[keep & ~wanted], omega[mask & ~keep]
        assert not len(extra) or not len(dropped) or float(extra.max()) <= float(dropped.min())
    looser = kept(omega, mask, threshold=min(1.0, threshold + 0.1), prefix=prefix, least=least)
    assert int(looser.sum()) >= int(keep.sum())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8),
    st.integers(0, 8),
    st.integers(0, 9),
    st.booleans(),
    st.floats(0.05, 0.95),
    st.integers(0, 2**31),
)
def test_changes_below_the_margin_choose_the_same_tokens(
    logits: list[float], padding: int, least: int, prefix: bool, threshold: float, seed: int
) -> None:
    omega = torch.tensor([logits + [float("nan")] * padding])
    mask = torch.arange(len(logits) + padding)[None] < len(logits)
    rule = {"threshold": threshold, "prefix": prefix, "least": least}
    (margin,) = halting_margin(omega, mask, **rule).tolist()  # type: ignore[arg-type]
    chosen = kept(omega, mask, **rule)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(seed)
    for _ in range(8):
        change = (2 * torch.rand(omega.shape, generator=random) - 1) * min(0.98 * margin, 100.0)
        assert torch.equal(kept(omega + change, mask, **rule), chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "prefix", "least", "margin"),
    [
        ([-3.0, 0.5, -1.0], True, 1, 0.5),
        ([-3.0, 2.0, 0.1], True, 1, 2.0),  # what follows the end of the image plays no part
        ([-3.0, -4.0, 2.0, 0.1], True, 1, 2.0),  # nor behind an end that the floor does not make
        ([-3.0, 2.0, 0.1], True, 2, 2.0),  # to keep a third, two would have to be kept that are halted
        ([-3.0, 0.1, 2.0], True, 2, 2.0),
        ([-3.0, 0.1, 2.0], True, 3, math.inf),  # all are kept in any case
        ([-3.0, 2.0, 0.1], True, 5, math.inf),
        ([0.2, -1.0, 3.0], True, 1, 0.2),
        ([-0.2, -1.0, 3.0], True, 1, 0.2),  # with the first halted, one token would be left of two
        ([-0.2, -1.0, 3.0], True, 2, 3.0),
        ([-0.2, -1.0, -3.0], True, 0, 0.2),
        ([-3.0, 2.0, 0.1], False, 1, 0.1),
        ([1.0, 1.25, 3.0], False, 1, 0.125),  # the only one that is kept could be another one
        ([1.0, 1.25, 3.0], False, 3, math.inf),
        ([-1.0, -0.75, 3.0], False, 1, 0.75),  # both are kept, in whatever order
        ([-0.1, 0.2], False, 1, 0.15),
        ([-1.0, 1.5, 1.75], False, 2, 0.125),
        ([5.0, 4.0], False, 0, 4.0),
    ],
)
def test_margins(logits: list[float], prefix: bool, least: int, margin: float) -> None:
    mask = torch.ones(1, len(logits), dtype=torch.bool)
    found = halting_margin(torch.tensor([logits]), mask, threshold=0.5, prefix=prefix, least=least)
    assert found.item() == pytest.approx(margin)
    alike = halting_margin(torch.tensor([logits]), mask, threshold=0.5, prefix=prefix, least=torch.tensor([least]))
    assert torch.equal(found, alike)


def test_one_token_is_kept_unless_the_floor_is_another() -> None:
    logits, mask = torch.tensor([[5.0, 6.0]]), torch.ones(1, 2, dtype=torch.bool)
    for prefix in (True, False):
        rule = {"threshold": 0.5, "prefix": prefix}
        assert kept(logits, mask, **rule).tolist() == [[True, False]]  # type: ignore[arg-type]
        one = halting_margin(logits, mask, **rule, least=1)  # type: ignore[arg-type]
        assert torch.equal(halting_margin(logits, mask, **rule), one)  # type: ignore[arg-type]


def test_no_token_has_no_margin() -> None:
    for prefix in (True, False):
        none = torch.zeros(2, 0)
        assert halting_margin(none, none.bool(), threshold=0.5, prefix=prefix).tolist() == [math.inf] * 2


def test_who_sees_whom() -> None:
    seen = causal_latents(2, 3, torch.device("cpu")).int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.fixture
def quantizer() -> CosineQuantizer:
    torch.manual_seed(0)
    return CosineQuantizer(8, 4)


def test_the_code_of_the_largest_cosine(quantizer: CosineQuantizer) -> None:
    tokens, mask = torch.randn(2, 5, 4), torch.arange(5) < torch.tensor([[5], [2]])
    values, codes, loss = quantizer(tokens.masked_fill(~mask[..., None], float("nan")), mask)
    assert codes is not None
    cosine = F.cosine_similarity(tokens[:, :, None], quantizer.codebook[None, None], dim=-1)
    assert torch.equal(codes[mask], cosine.argmax(-1)[mask])
    assert (codes[~mask] == -1).all()
    torch.testing.assert_close(values.norm(dim=-1), mask.float())
    assert torch.equal(quantizer.lookup(codes), values)
    unit, found = F.normalize(tokens[mask], dim=-1), values[mask]
    torch.testing.assert_close(loss, 1.25 * F.mse_loss(unit, found))


def test_a_large_codebook_is_searched_in_parts(quantizer: CosineQuantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = torch.randn(3, 5, 4), length_mask(torch.tensor([5, 2, 0]))
    codes, margin = quantizer(tokens, mask).codes, quantizer.margin(tokens, mask)
    for at_once in (1, 24):
        monkeypatch.setattr("tokenthrift.karl.quantizer.COSINES_AT_ONCE", at_once)
        assert torch.equal(quantizer(tokens, mask).codes, codes)
        assert torch.allclose(quantizer.margin(tokens, mask), margin, atol=1e-6)


def test_the_gradient_goes_straight_through(quantizer: CosineQuantizer) -> None:
    tokens, mask = torch.randn(1, 3, 4, requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    target = torch.randn(1, 3, 4)
    (quantizer(tokens, mask).values * target).sum().backward()
    again = tokens.detach().requires_grad_()
    (F.normalize(again, dim=-1) * target).sum().backward()
    torch.testing.assert_close(tokens.grad, again.grad)


def test_dead_codes_move_onto_tokens_in_use(quantizer: CosineQuantizer) -> None:
    tokens, mask = torch.randn(4, 6, 4), torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    with torch.no_grad():
        quantizer.codebook[5:] = quantizer.codebook[0] * torch.tensor([[1.0], [2.0], [3.0]])
    assert quantizer.restart(tokens, mask) == 0
    quantizer.train()
    for _ in range(700):
        quantizer(tokens, mask)
    dead = quantizer.usage < 0.01
    assert dead[5:].any()
    before = quantizer.codebook.detach().clone()
    moved = quantizer.restart(tokens, mask, generator=torch.Generator().manual_seed(0))
    assert moved == int(dead.sum()) > 0
    assert torch.equal(quantizer.codebook[~dead], before[~dead])
    real = F.normalize(tokens[mask], dim=-1)
    torch.testing.assert_close((quantizer.codebook[dead] @ real.T).amax(1), torch.ones(moved))
    used = quantizer(tokens, mask).codes.unique()
    assert torch.isin(dead.nonzero().flatten(), used).all()
    assert quantizer.restart(tokens, mask) == 0


def test_use_is_counted_in_training_only_and_without_padding(quantizer: CosineQuantizer) -> None:
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, False]] * 2)
    before = quantizer.usage.clone()
    quantizer.eval()(tokens, mask)
    assert torch.equal(quantizer.usage, before)
    codes = quantizer.train()(tokens, mask).codes
    assert set(codes[mask].tolist()) == set((quantizer.usage > before).nonzero().flatten().tolist())
    torch.testing.assert_close(quantizer.usage.mean(), torch.tensor(1.0))
    assert "usage" in quantizer.state_dict()


def test_dead_codes_are_those_below_the_threshold_and_no_more_than_there_are_tokens(
    quantizer: CosineQuantizer,
) -> None:
    tokens, mask = torch.randn(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    quantizer.usage.copy_(torch.tensor([0.0, 0.5, 0.01, 0.009, 1.0, 0.0, 2.0, 1.0]))
    before = quantizer.codebook.detach().clone()
    assert quantizer.restart(tokens, mask, 0.01) == 2, "three are dead and two tokens are there"
    moved = (quantizer.codebook != before).any(1)
    assert moved.nonzero().flatten().tolist() == [0, 3]
    assert quantizer.usage[[0, 3, 5]].tolist() == [1.0, 1.0, 0.0]
    assert quantizer.restart(tokens, mask, 0.01) == 1


def test_use_is_a_decaying_mean_relative_to_the_average_code(quantizer: CosineQuantizer) -> None:
    book = F.normalize(quantizer.codebook.detach(), dim=-1)
    quantizer.train()(book[[3, 3, 3, 5]][None], torch.ones(1, 4, dtype=torch.bool))
    expected = torch.full((8,), 0.99)
    expected[3] += 0.01 * 8 * 3 / 4
    expected[5] += 0.01 * 8 / 4
    torch.testing.assert_close(quantizer.usage, expected)
    quantizer(book[:1][None], torch.zeros(1, 1, dtype=torch.bool))
    torch.testing.assert_close(quantizer.usage, 0.99 * expected, msg="no token, no use")


def test_margins_of_codes(quantizer: CosineQuantizer) -> None:
    book = F.normalize(quantizer.codebook.detach(), dim=-1)
    between = F.normalize(book[0] + book[1], dim=-1)
    tokens = torch.stack([book[2], between, book[4], book[5]]).view(2, 2, 4)
    mask = torch.tensor([[True, False], [True, True]])
    cosine = (tokens @ book.T).topk(2).values
    gaps = cosine[..., 0] - cosine[..., 1]
    torch.testing.assert_close(quantizer.margin(tokens, mask), torch.stack([gaps[0, 0], gaps[1].min()]))
    assert quantizer.margin(tokens, torch.zeros_like(mask)).tolist() == [math.inf] * 2
    assert quantizer.margin(tokens[:, :0], mask[:, :0]).tolist() == [math.inf] * 2


def test_nothing_to_quantize_has_a_loss_with_a_gradient_of_zero(quantizer: CosineQuantizer) -> None:
    """Every process of a training has to reach every weight in every step."""
    tokens = torch.randn(1, 2, 4, requires_grad=True)
    values, codes, loss = quantizer(tokens, torch.zeros(1, 2, dtype=torch.bool))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert quantizer.codebook.grad is not None
    assert not quantizer.codebook.grad.any()
    assert not values.any()
    assert codes.tolist() == [[-1, -1]]


def test_the_commitment_weighs_a_quarter(quantizer: CosineQuantizer) -> None:
    tokens = torch.randn(1, 5, 4, requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool)
    values, _, loss = quantizer(tokens, mask)
    loss.backward()
    again = tokens.detach().requires_grad_()
    (0.25 * F.mse_loss(F.normalize(again, dim=-1), values.detach())).backward()
    torch.testing.assert_close(tokens.grad, again.grad)


def test_lookup_of_padding_is_zero(quantizer: CosineQuantizer) -> None:
    values = quantizer.lookup(torch.tensor([[0, -1], [7, -1]]))
    torch.testing.assert_close(values.norm(dim=-1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_groups_are_as_large_as_the_waste_allows() -> None:
    assert groups([10, 10, 10], 0) == [[0, 1, 2]]
    assert groups([1, 9, 10], 90) == [[2, 1], [0]]
    assert groups([8, 10], 90) == [[1, 0]], "2 of 200 are padding"
    assert groups([5, 10], 90) == [[1], [0]], "5 of 200 are more than a fiftieth"
    assert groups([6, 10], 90) == [[1, 0]], "4 of 200 are a fiftieth"
    assert groups([6, 6, 10], 90) == [[2, 0], [1]], "padding adds up"
    assert groups([0, 10], 0, waste=0.5) == [[1, 0]]
    assert groups([], 4) == []


def test_halting_at_the_threshold_and_by_default() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    level = torch.zeros(1, 3)
    assert kept(level, mask, threshold=0.5, prefix=True).all(), "only above the threshold"
    assert kept(level + 1, mask, threshold=0.5, prefix=True).tolist() == [[True, False, False]], "one is always kept"
    assert kept(level + 100, mask, threshold=1.0, prefix=True).all()
