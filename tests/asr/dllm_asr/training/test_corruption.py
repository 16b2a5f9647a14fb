"""The laws of the forward process and its loss."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.dllm_asr.training.corruption import (
    Corrupted,
    corrupt,
    diffusion_loss,
    hide_spans,
    mask_rates,
    substitute,
)

VOCAB, MASK = 6, 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def responses(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """True tokens (never MASK) and slots; lengths 1 to `width`."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=seeded(seed))
    return torch.randint(0, MASK, (rows, width), generator=seeded(seed + 1)), torch.arange(width) < lengths


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_rates_are_stratified_with_the_share_of_full_masks(rows: int, share: float, seed: int) -> None:
    eps = 1e-3
    rates = mask_rates(rows, fully_masked=share, eps=eps, generator=seeded(seed))
    assert rates.shape == (rows,)
    assert ((rates >= eps) & (rates <= 1)).all()
    full = int((rates >= 1 - 1e-6).sum())
    assert share * rows - 1 - 1e-3 <= full <= share * rows + 1 + 1e-3
    # One draw per slice of (0, 1): sorted, the i-th partial rate lies in the i-th slice.
    partial = rates[rates < 1 - 1e-6].double().sort().values
    u = (partial - eps) / (1 - eps) * max(1 - share, eps)
    i = torch.arange(len(u))
    assert ((u >= i / rows - 1e-5) & (u <= (i + 1) / rows + 1e-5)).all()


def test_the_rate_of_one_row_is_uniform_whatever_its_place() -> None:
    draws = torch.stack([mask_rates(4, fully_masked=0.0, generator=seeded(seed)) for seed in range(3000)])
    grid = torch.linspace(0.1, 0.9, 9)
    shares = (draws.unsqueeze(-1) < grid).float().mean(0)
    assert (shares - grid).abs().max() < 0.04


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_slots_are_hidden_at_the_rate_and_padding_never(rate: float, seed: int) -> None:
    ids, mask = responses(200, 20, seed)
    corrupted = corrupt(ids, mask, torch.full((200,), rate), mask_id=MASK, generator=seeded(seed))
    count = int(mask.sum())
    spread = (rate * (1 - rate) / count) ** 0.5
    assert abs(float(corrupted.masked[mask].float().mean()) - rate) <= 5 * spread + 1e-6
    assert not corrupted.masked[~mask].any()
    assert (corrupted.ids[corrupted.masked] == MASK).all()
    assert torch.equal(corrupted.ids[~corrupted.masked], ids[~corrupted.masked])


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_rows_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        mask_rates(4, fully_masked=share)


def test_the_generator_alone_decides_and_inputs_stay() -> None:
    ids, mask = responses(8, 10)
    before = ids.clone()
    state = torch.get_rng_state()

    def draw() -> Corrupted:
        generator = seeded(3)
        seen = corrupt(ids, mask, mask_rates(8, generator=generator), mask_id=MASK, generator=generator)
        return replace(seen, ids=substitute(seen.ids, ~seen.masked, 0.5, torch.ones(VOCAB), generator=generator))

    first, second = draw(), draw()
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.rates, second.rates)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ids, before)


def test_substitutes_come_from_the_table_of_the_true_token() -> None:
    ids, mask = responses(400, 20)
    # Token k is mistaken for k + 1 three times as often as for k + 2 (modulo 5), never for another.
    table = torch.zeros(VOCAB, VOCAB)
    for token in range(MASK):
        table[token, (token + 1) % MASK] = 3.0
        table[token, (token + 2) % MASK] = 1.0
    where = mask & (torch.rand(mask.shape, generator=seeded(1)) < 0.5)
    drawn = substitute(ids, where, 0.3, table, generator=seeded(0))
    changed = drawn != ids
    assert not changed[~where].any()
    assert abs(float(changed[where].float().mean()) - 0.3) < 0.03
    step = (drawn - ids)[changed] % MASK
    assert set(step.tolist()) == {1, 2}
    assert abs(float((step == 1).float().mean()) - 0.75) < 0.05


def test_a_table_for_all_tokens_may_draw_the_true_one() -> None:
    ids, mask = responses(50, 10)
    only_two = torch.zeros(VOCAB)
    only_two[2] = 1.0
    drawn = substitute(ids, mask, 1.0, only_two, generator=seeded(0))
    assert (drawn[mask] == 2).all()
    assert torch.equal(drawn[~mask], ids[~mask])


def toy_losses() -> tuple[Tensor, Tensor, Tensor]:
    """One response of 3 slots, and the cross-entropy (8, 3) of every slot under every mask pattern (8, 3)."""
    targets = torch.tensor([1, 4, 2])
    patterns = torch.tensor(list(itertools.product([False, True], repeat=3)))
    logits = torch.randn(8, 3, VOCAB, generator=seeded(0), dtype=torch.float64)
    return targets, patterns, logits


def test_the_loss_is_unbiased_against_brute_force() -> None:
    targets, patterns, logits = toy_losses()
    ce = -logits.log_softmax(-1).gather(-1, targets.expand(8, 3).unsqueeze(-1)).squeeze(-1)
    eps, share = 1e-3, 0.2
    # Exact expectation: integrate over t (fine grid) and sum over all patterns.
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    p = (1 - eps) * t + eps

    def at(p: Tensor) -> Tensor:
        hidden = patterns.sum(1)[:, None]
        chance = p**hidden * (1 - p) ** (3 - hidden)
        return (chance * (ce * patterns).sum(1)[:, None] / p).sum(0) / 3

    exact = float((1 - share) * at(p).mean() + share * at(torch.ones(1, dtype=torch.float64))[0])

    rows = 60000
    generator = seeded(1)
    ids, mask = targets.expand(rows, 3), torch.ones(rows, 3, dtype=torch.bool)
    corrupted = corrupt(
        ids, mask, mask_rates(rows, fully_masked=share, eps=eps, generator=generator), mask_id=MASK, generator=generator
    )
    seen = (corrupted.masked * torch.tensor([4, 2, 1])).sum(1)
    drawn = float(diffusion_loss(logits[seen].float(), ids, mask, corrupted))
    assert drawn == pytest.approx(exact, rel=0.02)


def test_weights_are_one_over_rate_and_length() -> None:
    targets, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[True, True, True, False]])
    masked = torch.tensor([[True, False, True, False]])
    corrupted = Corrupted(targets.masked_fill(masked, MASK), masked, torch.tensor([0.25]))
    logits = torch.randn(1, 4, VOCAB, generator=seeded(0))
    ce = -logits.log_softmax(-1)[0, range(4), targets[0]]
    published = diffusion_loss(logits, targets, mask, corrupted)
    torch.testing.assert_close(published, (ce[0] + ce[2]) / 0.25 / 3)
    both = diffusion_loss(logits, targets, mask, corrupted, visible_weight=0.5)
    torch.testing.assert_close(both, published + 0.5 * ce[1] / 3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_padding_and_neighbours_do_not_change_a_row(seed: int, visible_weight: float) -> None:
    ids, mask = responses(5, 7, seed)
    generator = seeded(seed)
    corrupted = corrupt(ids, mask, mask_rates(5, generator=generator), mask_id=MASK, generator=generator)
    logits = torch.randn(5, 7, VOCAB, generator=generator)
    logits[..., MASK] = -torch.inf
    spoiled = logits.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    loss = diffusion_loss(spoiled, ids.masked_fill(~mask, 10**6), mask, corrupted, visible_weight=visible_weight)
    torch.autograd.backward(loss)
    assert spoiled.grad is not None
    assert (spoiled.grad[~mask] == 0).all()
    assert spoiled.grad.isfinite().all()
    alone = []
    for row in range(5):
        one, slots = slice(row, row + 1), int(mask[row].sum())
        part = Corrupted(corrupted.ids[one, :slots], corrupted.masked[one, :slots], corrupted.rates[one])
        alone.append(
            diffusion_loss(
                logits[one, :slots], ids[one, :slots], mask[one, :slots], part, visible_weight=visible_weight
            )
        )
    torch.testing.assert_close(loss.detach(), torch.stack(alone).mean())


def test_a_batch_in_which_nothing_was_hidden_costs_nothing() -> None:
    ids, mask = responses(2, 3)
    nothing = torch.zeros_like(mask)
    logits = torch.randn(2, 3, VOCAB, generator=seeded(0), requires_grad=True)
    loss = diffusion_loss(logits, ids, mask, Corrupted(ids, nothing, torch.full((2,), 0.1)))
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_training_on_it_recovers_a_hidden_language() -> None:
    """A table per slot, trained by the loss, must end at the true distribution of each slot."""
    generator = seeded(0)
    truth = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 0.2, 0.8, 0], [0, 0.1, 0, 0, 0.9]])
    table = torch.zeros(3, VOCAB, requires_grad=True)
    optimiser = torch.optim.Adam([table], lr=0.05)
    mask = torch.ones(256, 3, dtype=torch.bool)
    for _ in range(200):
        ids = torch.multinomial(truth, 256, replacement=True, generator=generator).T.contiguous()
        corrupted = corrupt(ids, mask, mask_rates(256, generator=generator), mask_id=MASK, generator=generator)
        loss = diffusion_loss(table.expand(256, -1, -1), ids, mask, corrupted)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    torch.testing.assert_close(table.detach().softmax(-1)[:, :MASK], truth, rtol=0, atol=0.05)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 0.4), st.integers(1, 30), st.integers(0, 1000))
def test_hidden_spans_are_repeatable_and_within_their_rows(share: float, longest: int, seed: int) -> None:
    states, lengths = torch.ones(3, 300, 2), torch.tensor([300, 300, 40])
    hidden = hide_spans(states, lengths, share, longest=longest, seed=seed)
    assert torch.equal(hidden, hide_spans(states, lengths, share, longest=longest, seed=seed))
    assert (states == 1).all()
    assert torch.equal(hidden[..., 0], hidden[..., 1])
    assert (hidden[2, 40 + longest :] == 1).all()
    assert torch.equal(hide_spans(states, lengths, 0.0), states)


@pytest.mark.parametrize(("share", "longest"), [(0.05, 15), (0.3, 15), (0.1, 1), (0.1, 40)])
def test_about_the_asked_share_of_states_is_hidden(share: float, longest: int) -> None:
    hidden = hide_spans(torch.ones(20, 3000, 1), torch.full((20,), 3000), share, longest=longest)
    # Spans may overlap, which hides a little less: 1 - exp(-share) in the mean.
    assert 1 - hidden.mean().item() == pytest.approx(1 - math.exp(-share), rel=0.1)
