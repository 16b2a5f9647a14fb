"""The laws of the forward process and its loss."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.dllm_asr.training.corruption import (
    Corrupted,
    corrupt,
    diffusion_loss,
    mask_rate,
    substitute,
    time_mask,
)

VOCAB, MASK = 6, 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_at(ids: Tensor, mask: Tensor, rates: Tensor, generator: torch.Generator) -> Corrupted:
    """A batch whose slots are masked at the rate of their row."""
    masked = mask & (torch.rand(ids.shape, generator=generator) < rates[:, None])
    return Corrupted(ids.masked_fill(masked, MASK), masked, rates)


def responses(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """True tokens (never MASK) and slots; lengths 1 to `width`."""
    lengths = torch.randint(1, width + 1, (rows, 1), generator=seeded(seed))
    return torch.randint(0, MASK, (rows, width), generator=seeded(seed + 1)), torch.arange(width) < lengths


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_a_rate_is_one_with_the_given_probability_and_uniform_below(u: float, share: float) -> None:
    eps = 1e-3
    rate = mask_rate(u, fully_masked_prob=share, eps=eps)
    if u < (1 - share) - 1e-9 and share <= 1 - eps:
        assert rate == pytest.approx((1 - eps) * u / (1 - share) + eps)
    elif u > max(1 - share, eps) + 1e-9:
        assert rate == 1.0
    assert eps <= rate <= 1.0


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_slots_are_masked_at_the_rate(rate: float, seed: int) -> None:
    ids = torch.randint(0, MASK, (4000,), generator=seeded(seed))
    corrupted = corrupt(ids, rate, mask_id=MASK, generator=seeded(seed))
    spread = (rate * (1 - rate) / 4000) ** 0.5
    assert abs(float((corrupted == MASK).float().mean()) - rate) <= 5 * spread + 1e-6
    assert torch.equal(corrupted[corrupted != MASK], ids[corrupted != MASK])


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_probability_is_a_probability(share: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        mask_rate(0.5, fully_masked_prob=share)


def test_the_generator_alone_decides_and_inputs_stay() -> None:
    ids, _ = responses(8, 10)
    before = ids.clone()
    state = torch.get_rng_state()

    def draw() -> Tensor:
        generator = seeded(3)
        seen = corrupt(ids[0], 0.5, mask_id=MASK, generator=generator)
        return substitute(seen, seen != MASK, 0.5, torch.ones(VOCAB), generator=generator)

    assert torch.equal(draw(), draw())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ids, before)


def test_a_fifth_is_masked_throughout_unless_told() -> None:
    assert mask_rate(0.8) == 1.0
    assert mask_rate(0.79) < 1.0


def test_what_was_not_drawn_is_a_copy_too() -> None:
    ids = torch.tensor([3, 4])
    kept = substitute(ids, torch.zeros(2, dtype=torch.bool), 1.0, torch.ones(6))
    assert torch.equal(kept, ids)
    assert kept.data_ptr() != ids.data_ptr()


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
    u = torch.rand(rows, generator=generator).tolist()
    rates = torch.tensor([mask_rate(value, fully_masked_prob=share, eps=eps) for value in u])
    corrupted = masked_at(ids, mask, rates, generator)
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
    corrupted = masked_at(ids, mask, torch.rand(5, generator=generator) + 1e-3, generator)
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
    optimizer = torch.optim.Adam([table], lr=0.05)
    mask = torch.ones(256, 3, dtype=torch.bool)
    for _ in range(200):
        ids = torch.multinomial(truth, 256, replacement=True, generator=generator).T.contiguous()
        corrupted = masked_at(ids, mask, torch.rand(256, generator=generator) * 0.999 + 1e-3, generator)
        loss = diffusion_loss(table.expand(256, -1, -1), ids, mask, corrupted)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    torch.testing.assert_close(table.detach().softmax(-1)[:, :MASK], truth, rtol=0, atol=0.05)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 0.4), st.integers(1, 30), st.integers(0, 1000))
def test_masked_spans_are_repeatable_and_within_their_rows(share: float, longest: int, seed: int) -> None:
    states, lengths, seeds = torch.ones(3, 300, 2), torch.tensor([300, 300, 40]), [seed, seed + 1, seed]
    masked = time_mask(states, lengths, share, seeds, longest=longest)
    assert torch.equal(masked, time_mask(states, lengths, share, seeds, longest=longest))
    assert (states == 1).all()
    assert torch.equal(masked[..., 0], masked[..., 1])
    assert (masked[2, 40 + longest :] == 1).all()
    assert torch.equal(time_mask(states, lengths, 0.0, seeds), states)
    alone = time_mask(states[1:2], lengths[1:2], share, seeds[1:2], longest=longest)
    assert torch.equal(alone[0], masked[1]), "the spans of a row do not depend on the batch"


def test_rows_of_equal_length_have_spans_of_their_own() -> None:
    masked = time_mask(torch.ones(4, 300, 1), torch.full((4,), 300), 0.2, range(4))
    assert len({row.numpy().tobytes() for row in masked}) == 4


@pytest.mark.parametrize(("share", "longest"), [(0.05, 15), (0.3, 15), (0.1, 1), (0.1, 40)])
def test_about_the_given_share_of_states_is_masked(share: float, longest: int) -> None:
    masked = time_mask(torch.ones(20, 3000, 1), torch.full((20,), 3000), share, range(20), longest=longest)
    # Spans may overlap, which masks a little less: 1 - exp(-share) in the mean.
    assert 1 - masked.mean().item() == pytest.approx(1 - math.exp(-share), rel=0.1)
