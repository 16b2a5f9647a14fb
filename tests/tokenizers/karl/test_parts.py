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
