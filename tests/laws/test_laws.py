"""The contract suite: every law of the budget interface over every reducer and every system.

One more system is one more line in `subjects.SUBJECTS`; `Halves` at the end shows it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.laws.subjects import EXCEPTIONS, SUBJECTS, Row, Subject, batch_of, reduce, rows_of, size_of
from tests.multimodal.budget_strategies import budgets
from tests.multimodal.tiny_vlms import ROWS, build, encode, logits
from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetError, BudgetSupport, SizeLike, TokenBudget, TokenUsage
from tokenthrift.tokens import TokenBatch

CEILINGS = {"max_tokens": 4, "retention": 0.5, "tokens_per_second": 4.0, "target_error": 0.1}


class Halves:
    """A fifth system for the suite: keeps the first half of an item, or less, in pairs of tokens."""

    support = BudgetSupport(fields=frozenset({"max_tokens"}), max_tokens=16, nested=True, training_free=True)

    def plan(self, items: Sequence[SizeLike], budget: Any = None) -> tuple[TokenUsage, ...]:
        planned = self.support.plan(items, budget)
        return tuple(replace(usage, used=min(usage.cap, usage.native // 2)) for usage in planned)

    def halve(self, items: Sequence[Tensor], budget: Any = None) -> TokenBatch:
        tokens = batch_of(items)
        planned = self.plan(tokens.item_sizes(), budget)
        return replace(tokens.first([usage.used for usage in planned]), usage=planned)


EXAMPLE = Subject(
    "Halves",
    Halves,
    lambda seed: [torch.full((n, 2), float(n + seed)).cumsum(0) for n in (3, 30, 8)],
    size_of,
    lambda system, items, budget: rows_of(system.halve(items, budget)),
    ("2", "5", "30"),
)
ALL = [*SUBJECTS, EXAMPLE]


def over(law: str, *, reducers: bool = False) -> pytest.MarkDecorator:
    """Every subject, or every reducer, but for those that are named as exceptions to the law."""
    chosen = [s for s in ALL if (s.reducer or not reducers) and (s.name, law) not in EXCEPTIONS]
    return pytest.mark.parametrize("subject", chosen, ids=[s.name for s in chosen])


def each_case(subject: Subject, law: Any) -> None:
    """Tries a law on drawn seeds and budgets of the subject's own."""

    own: st.SearchStrategy[Any] = st.sampled_from(list(subject.budgets))

    @settings(deadline=None, max_examples=subject.examples, database=None)
    @given(seed=st.integers(0, 99), budget=own | budgets() if subject.reducer else own)
    def check(seed: int, budget: Any) -> None:
        items = subject.items(seed)
        try:
            subject.plan(items, budget)
        except BudgetError:  # too strict for one of the items: then the run refuses it as well
            with pytest.raises(BudgetError):
                subject.run(subject.built(), items, budget)
        else:
            law(items, budget)

    check()


def assert_equal_rows(ours: Sequence[Row], wanted: Sequence[Row]) -> None:
    assert [replace(row.usage, error=None) for row in ours] == [replace(row.usage, error=None) for row in wanted]
    assert [row.usage.error for row in ours] == pytest.approx([row.usage.error for row in wanted], abs=1e-5)
    assert [row.exact for row in ours] == [row.exact for row in wanted]
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a.floats, b.floats, rtol=0, atol=1e-5)


@over("ceiling")
def test_never_more_than_the_cap_and_the_plan_is_kept(subject: Subject) -> None:
    """Laws 1 and 3: used <= cap <= min(native, max_tokens); used is the plan, or at most the plan where adaptive."""
    adaptive = subject.built().support.adaptive

    def law(items: list[Any], budget: Any) -> None:
        planned = subject.plan(items, budget)
        found = [row.usage for row in subject.run(subject.built(), items, budget)]
        limit = TokenBudget.parse(budget).max_tokens
        for plan, usage in zip(planned, found, strict=True):
            assert usage.used <= usage.cap <= usage.native
            assert limit is None or usage.cap <= limit
            assert (usage.native, usage.cap) == (plan.native, plan.cap)
            assert usage.used <= plan.used if adaptive else usage.used == plan.used

    each_case(subject, law)


@over("fields")
@pytest.mark.parametrize("name", CEILINGS)
def test_a_ceiling_is_honored_or_refused(subject: Subject, name: str) -> None:
    """Law 2: nothing is ignored, neither by the plan nor by the run."""
    system, items, budget = subject.built(), subject.items(0), {name: CEILINGS[name], "min_tokens": 0}
    if name in system.support.fields:
        return  # honored: law 1 holds it to what it says
    for call in (subject.plan, lambda items, budget: subject.run(system, items, budget)):
        with pytest.raises(BudgetError, match=name):
            call(items, budget)


@over("whole", reducers=True)
@pytest.mark.parametrize("budget", [None, "100%", 99])
def test_a_budget_at_or_above_native_changes_no_bit(subject: Subject, budget: Any) -> None:
    """Law 4."""
    tokens = batch_of(subject.items(0), left=True, fill=torch.nan, extra=2)
    out = subject.built().reduce(tokens, budget)
    for name in ("embeddings", "mask", "positions", "codes", "sizes"):
        assert getattr(out, name) is getattr(tokens, name)


@over("relaxing")
def test_relaxing_a_field_never_lowers_the_cap(subject: Subject) -> None:
    """Law 5, also over several budgets in a row."""
    system, items = subject.built(), subject.items(1)
    for name in sorted(system.support.fields - {"target_error"}):
        steps = {"max_tokens": range(1, 40), "retention": np.linspace(0.02, 1, 30)}.get(name, np.linspace(0.5, 200, 40))
        before = [0] * len(items)
        for value in steps:
            budget = {name: int(value) if name == "max_tokens" else float(value), "min_tokens": 0}
            try:
                caps = [usage.cap for usage in subject.plan(items, budget)]
            except BudgetError:
                assert not any(before)  # too strict at first, never again once it was enough
                continue
            assert all(old <= new for old, new in zip(before, caps, strict=True))
            before = caps


@over("nested")
def test_nested_systems_keep_prefixes(subject: Subject) -> None:
    """Law 6: the tokens of a smaller budget are the first of a larger one."""
    system, items = subject.built(), subject.items(2)
    if not system.support.nested:
        return
    few, more = (subject.run(system, items, {"max_tokens": n, "min_tokens": 0}) for n in (2, 5))
    for short, long in zip(few, more, strict=True):
        assert 0 < len(short.floats) <= len(long.floats)
        torch.testing.assert_close(short.floats, long.floats[: len(short.floats)], rtol=0, atol=1e-5)
        for a, b in zip(short.exact, long.exact, strict=True):
            assert a == (b if b is None else b[: len(a)])


@over("determinism")
def test_same_bits_again_and_no_global_randomness(subject: Subject) -> None:
    """Law 7: the global random states of torch, numpy and Python are neither read nor changed."""
    system, items, budget = subject.built(), subject.items(3), subject.budgets[-2]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    first = subject.run(system, items, budget)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[index]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = subject.run(system, items, budget)
    assert [row[:2] for row in first] == [row[:2] for row in again]
    assert all(torch.equal(a.floats, b.floats) for a, b in zip(first, again, strict=True))


@over("batch")
def test_a_row_is_the_row_alone_whatever_its_neighbors(subject: Subject) -> None:
    """Law 8, also in another order."""
    system = subject.built()

    def law(items: list[Any], budget: Any) -> None:
        together = subject.run(system, items, budget)
        assert_equal_rows(subject.run(system, items[::-1], budget)[::-1], together)
        for item, row in zip(items, together, strict=True):
            assert_equal_rows(subject.run(system, [item], budget), [row])

    each_case(subject, law)


@over("padding", reducers=True)
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_never_read(subject: Subject, left: bool) -> None:
    """Law 8: NaN in padding, on either side, and more of it than needed."""
    system = subject.built()

    def law(items: list[Any], budget: Any) -> None:
        padded = batch_of(items, left=left, fill=torch.nan, extra=3)
        assert_equal_rows(rows_of(system.reduce(padded, budget)), reduce(system, items, budget))

    each_case(subject, law)


@over("attach", reducers=True)
def test_attached_and_left_the_model_is_as_before(subject: Subject) -> None:
    """Law 9, also after an exception; threads, copies and two models of one class: `test_attachment_limits`."""
    model = build("qwen2_vl")
    inputs = encode(model, ROWS)
    before, keys = logits(model, inputs), list(model.state_dict())
    with attach(model, subject.built(), "50%"):
        assert not torch.equal(logits(model, inputs), before)
    with pytest.raises(ZeroDivisionError), attach(model, subject.built(), "50%"):
        raise ZeroDivisionError
    assert torch.equal(logits(model, inputs), before)
    assert list(model.state_dict()) == keys


@over("forms")
def test_every_form_of_a_budget_is_read_alike(subject: Subject) -> None:
    """Law 10: text, number, mapping, JSON and dataclass; an unknown key raises; one budget for each item."""
    system, items = subject.built(), subject.items(4)
    budget = TokenBudget.parse(subject.budgets[-2])
    forms: list[Any] = [subject.budgets[-2], budget.to_dict(), json.dumps(budget.to_dict()), [budget] * len(items)]
    if set(budget.to_dict()) == {"max_tokens"}:
        forms.append(budget.max_tokens)
    wanted = subject.run(system, items, budget)
    for form in forms:
        assert subject.plan(items, form) == subject.plan(items, budget)
        assert_equal_rows(subject.run(system, items, form), wanted)
    for call in (subject.plan, lambda items, budget: subject.run(system, items, budget)):
        with pytest.raises(BudgetError, match="max_token'"):
            call(items, {"max_token": 4})
        with pytest.raises(ValueError, match="budgets"):
            call(items, [budget] * (len(items) + 1))


@over("each")
def test_every_item_may_have_a_budget_of_its_own(subject: Subject) -> None:
    system, items = subject.built(), subject.items(5)
    own = [{**TokenBudget.parse(budget).to_dict(), "min_tokens": 0} for budget in subject.budgets]
    each = [own[i % len(own)] for i in range(len(items))]
    together = subject.run(system, items, each)
    assert [row.usage.cap for row in together] == [usage.cap for usage in subject.plan(items, each)]
    for item, budget, row in zip(items, each, together, strict=True):
        assert_equal_rows(subject.run(system, [item], budget), [row])


@pytest.mark.parametrize("subject", ALL, ids=[s.name for s in ALL])
def test_a_plan_needs_neither_weights_nor_a_device(subject: Subject) -> None:
    """Laws 3: a model on the meta device plans as the real one does."""
    system, items = subject.build(), subject.items(6)
    if isinstance(system, torch.nn.Module):
        system = system.to("meta")
    sizes = [subject.size(item) for item in items]
    for text in subject.budgets:
        budget = {**TokenBudget.parse(text).to_dict(), "min_tokens": 0}
        assert system.plan(sizes, budget) == subject.plan(items, budget)
    assert system.plan([], None) == ()


def test_exceptions_are_of_subjects_and_laws_that_exist() -> None:
    names, laws = {subject.name for subject in ALL}, {"whole", "attach", "batch", "nested"}
    assert all(name in names and law in laws and reason for (name, law), reason in EXCEPTIONS.items())


def test_the_exceptions_are_real() -> None:
    stacking = next(subject for subject in SUBJECTS if subject.name == "Stacking").built()
    tokens = batch_of([torch.randn(4, 6)])
    out = stacking.reduce(tokens, None)
    assert out.embeddings.shape == (1, 4, 6 * stacking.rate)
    assert torch.equal(out.embeddings[..., :6], tokens.embeddings)
    model = build("qwen2_vl")
    with pytest.raises(ValueError, match="keeps the width"), attach(model, stacking, "50%"):
        logits(model, encode(model, ROWS))
