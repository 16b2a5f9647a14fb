"""Laws of the budget types: never exceed, never ignore, relaxing never lowers, and one short form everywhere."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from tests.multimodal.budget_strategies import RATES, SHARES, budgets
from tokenthrift.budget import (
    BudgetError,
    BudgetLike,
    BudgetSupport,
    DecodeBudget,
    ItemSize,
    TokenBudget,
    TokenUsage,
    budgets_for,
    sizes_of,
)

yaml = importlib.import_module("yaml")  # not by an import statement: it has no types
NATIVE = st.integers(0, 200)
SECONDS = st.integers(0, 300).map(lambda tenths: tenths / 10)


class Probe:
    """Something a parser can build that takes a budget."""

    def __init__(self, budget: BudgetLike = "100%", name: str = "probe") -> None:
        self.budget = TokenBudget.parse(budget)


def parsed(*arguments: str) -> TokenBudget:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Probe, "probe")
    config = parser.parse_args(list(arguments))
    again = parser.parse_string(parser.dump(config))
    budget = parser.instantiate(config).probe.budget
    assert parser.instantiate(again).probe.budget == budget
    assert isinstance(budget, TokenBudget)
    return budget


def test_import_needs_neither_torch_nor_numpy_nor_jsonargparse() -> None:
    check = (
        "import sys, tokenthrift.budget as b; b.TokenBudget.parse('25%').cap(10);"
        "print(*{'torch', 'numpy', 'jsonargparse', 'transformers'}.intersection(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


SHORT = {
    "64": TokenBudget(max_tokens=64),
    "25%": TokenBudget(retention=0.25),
    "33.3%": TokenBudget(retention=0.333),
    "12.5/s": TokenBudget(tokens_per_second=12.5),
    "e0.05": TokenBudget(target_error=0.05),
    "64,e0.05": TokenBudget(max_tokens=64, target_error=0.05),
    "64, 25%, 12.5/s, e0.05": TokenBudget(max_tokens=64, retention=0.25, tokens_per_second=12.5, target_error=0.05),
    "100%": TokenBudget(retention=1.0),
    '{"max_tokens": 64, "min_tokens": 2}': TokenBudget(max_tokens=64, min_tokens=2),
}


@pytest.mark.parametrize(("text", "budget"), SHORT.items())
def test_short_forms_from_python_flags_yaml_and_json(text: str, budget: TokenBudget, tmp_path: Path) -> None:
    assert TokenBudget.parse(text) == budget
    assert parsed(f"--probe.budget={text}") == budget
    assert parsed("--probe.budget", text) == budget
    scalar = int(text) if text.isdigit() else text
    for value in (scalar, budget.to_dict()):
        for suffix, dump in ((".yaml", yaml.safe_dump), (".json", json.dumps)):
            path = tmp_path / f"config{suffix}"
            path.write_text(dump({"probe": {"budget": value}}))
            assert parsed(f"--config={path}") == budget


def test_fields_are_flags_too() -> None:
    assert parsed("--probe.budget.max_tokens=5", "--probe.budget.retention=0.5") == TokenBudget(
        max_tokens=5, retention=0.5
    )
    assert parsed() == TokenBudget(retention=1.0)


@pytest.mark.parametrize(
    "text",
    ["", ",", "64,", "0", "-3", "6.5", "64,65", "abc", "0%", "101%", "nan%", "25 percent", "inf/s", "-1/s", "/s", "e-1"]
    + ["e", "einf", "25%,64,30%", '{"max_tokens": 0}', '{"max_token": 5}', "{bad"],
)
def test_what_is_no_budget_raises_and_says_what_would_be(text: str) -> None:
    with pytest.raises(BudgetError, match=r"; allowed: .+; nearest legal value: .+"):
        TokenBudget.parse(text)
    with pytest.raises((BudgetError, ValueError)):
        parsed(f"--probe.budget={text}")


@pytest.mark.parametrize("value", [0.25, True, [64]])
def test_numbers_of_unclear_unit_raise(value: object) -> None:
    with pytest.raises(BudgetError):
        TokenBudget.parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 1.0}, {"max_tokens": True}, {"min_tokens": None}, {"min_tokens": -1}, {"retention": "25%"}]
    + [{"max_tokens": 3, "min_tokens": 4}, {"target_error": float("nan")}],
)
def test_fields_out_of_range_raise(fields: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        TokenBudget.from_dict(fields)


@given(budgets(floor=1), st.none() | SHARES)
def test_budgets_round_trip_through_json_and_yaml(budget: TokenBudget, error: float | None) -> None:
    budget = replace(budget, target_error=error)
    assert TokenBudget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    assert TokenBudget.parse(yaml.safe_load(yaml.safe_dump(budget.to_dict()))) == budget
    assert TokenBudget.parse(json.dumps(budget.to_dict())) == budget
    assert pickle.loads(pickle.dumps(budget)) == budget


@given(st.none() | st.integers(1, 99), st.none() | st.integers(1, 99), st.none() | SHARES)
def test_decode_budgets_round_trip(tokens: int | None, rounds: int | None, threshold: float | None) -> None:
    budget = DecodeBudget(max_new_tokens=tokens, max_rounds=rounds, confidence_threshold=threshold)
    assert DecodeBudget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize("cls", [TokenBudget, DecodeBudget])
def test_an_unknown_key_raises_and_names_the_nearest(cls: type[TokenBudget] | type[DecodeBudget]) -> None:
    known = "max_tokens" if cls is TokenBudget else "max_rounds"
    with pytest.raises(BudgetError) as caught:
        cls.from_dict({known[:-1]: 5})
    assert caught.value.nearest == known
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("fields", [{"max_rounds": 0}, {"max_new_tokens": 0}, {"confidence_threshold": 0.0}])
def test_decode_budgets_out_of_range_raise(fields: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        DecodeBudget.from_dict(fields)


@given(budgets(), NATIVE, SECONDS)
def test_a_cap_never_exceeds_any_ceiling(budget: TokenBudget, native: int, seconds: float) -> None:
    cap = budget.cap(native, seconds)
    assert 0 <= cap <= native
    assert budget.max_tokens is None or cap <= budget.max_tokens
    assert budget.retention is None or cap <= budget.retention * native + 1e-9
    assert budget.tokens_per_second is None or cap <= budget.tokens_per_second * seconds + 1e-9


@given(budgets(), NATIVE, SECONDS, st.data())
def test_relaxing_a_field_never_lowers_the_cap(
    budget: TokenBudget, native: int, seconds: float, data: st.DataObject
) -> None:
    looser = {
        "max_tokens": st.integers(budget.max_tokens or 1, 400),
        "retention": SHARES.map(lambda share: max(share, budget.retention or 0.01)),
        "tokens_per_second": RATES.map(lambda rate: max(rate, budget.tokens_per_second or 0.1)),
    }
    name = data.draw(st.sampled_from([n for n in looser if getattr(budget, n) is not None] or ["target_error"]))
    value = data.draw(st.none() | looser[name]) if name in looser else data.draw(st.none() | SHARES)
    relaxed = TokenBudget.from_dict(budget.to_dict() | {name: value})
    assert relaxed.cap(native, seconds) >= budget.cap(native, seconds)


def test_shares_are_the_decimal_number_that_was_written() -> None:
    assert TokenBudget.parse("29%").cap(100) == 29  # 0.29 * 100 is 28.999999999999996
    assert TokenBudget.parse("12.6/s").cap(9999, 5.0) == 63


def test_a_floor_above_the_cap_raises_and_names_a_floor_that_works() -> None:
    budget = TokenBudget(retention=0.25)
    with pytest.raises(BudgetError, match="min_tokens=0") as caught:
        budget.cap(3)
    assert replace(budget, min_tokens=int(str(caught.value.nearest).removeprefix("min_tokens="))).cap(3) == 0
    assert budget.cap(0) == 0
    assert TokenBudget(max_tokens=9, min_tokens=9).cap(4) == 4


@pytest.mark.parametrize(("native", "seconds"), [(-1, 1.0), (5, -1.0), (5, float("nan"))])
def test_counts_and_durations_out_of_range_raise(native: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="not"):
        TokenBudget(tokens_per_second=1.0, min_tokens=0).cap(native, seconds)


def test_a_rate_needs_a_duration() -> None:
    with pytest.raises(BudgetError, match="unknown duration"):
        TokenBudget(tokens_per_second=12.5).cap(100)


@pytest.mark.parametrize("name", ["max_tokens", "retention", "tokens_per_second", "target_error"])
def test_a_ceiling_that_is_not_honored_raises(name: str) -> None:
    budget = TokenBudget.from_dict({name: 1})
    others = {"max_tokens", "retention", "tokens_per_second", "target_error"} - {name}
    with pytest.raises(BudgetError, match=f"nearest legal value: no {name}"):
        BudgetSupport(fields=frozenset(others)).plan([ItemSize(native=10, seconds=1.0)], budget)
    (usage,) = BudgetSupport(fields=frozenset({name})).plan([ItemSize(native=10, seconds=10.0)], budget)
    assert usage.cap in (1, 10)


@given(budgets(seconds=False), NATIVE, st.sets(st.integers(0, 60), min_size=1), st.none() | st.integers(0, 60))
def test_choices_are_snapped_to_downwards(
    budget: TokenBudget, native: int, choices: set[int], limit: int | None
) -> None:
    grid = tuple(sorted(choices))
    support = BudgetSupport(fields=frozenset({"max_tokens", "retention"}), choices=grid, max_tokens=limit)
    ceiling = min(budget.cap(native), native if limit is None else limit)
    if ceiling < grid[0] and ceiling < native:
        with pytest.raises(BudgetError):
            support.plan([native], budget)
    else:
        ((cap, used),) = ((usage.cap, usage.used) for usage in support.plan([native], budget))
        assert used == cap
        assert cap == ceiling == native or cap == max(c for c in grid if c <= ceiling)


def test_a_snapped_cap_below_the_floor_raises() -> None:
    support = BudgetSupport(fields=frozenset({"max_tokens"}), choices=(16, 64))
    with pytest.raises(BudgetError, match="min_tokens=16"):
        support.plan([100], TokenBudget(max_tokens=40, min_tokens=20))
    assert [usage.used for usage in support.plan([100, 100, 12], 64)] == [64, 64, 12]


def test_support_rejects_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="quality"):
        BudgetSupport(fields=frozenset({"quality"}))
    with pytest.raises(ValueError, match="ascending"):
        BudgetSupport(fields=frozenset(), choices=(64, 16))
    with pytest.raises(ValueError, match="2 items but 1 budgets"):
        BudgetSupport(fields=frozenset()).plan([1, 2], ["100%"])


def test_a_system_without_any_ceiling_says_so() -> None:
    with pytest.raises(BudgetError, match=r"retention=0\.25; allowed: no ceiling: this system has one count"):
        BudgetSupport(fields=frozenset()).check(TokenBudget(retention=0.25))
    with pytest.raises(BudgetError, match="allowed: the fields max_tokens; nearest legal value: no retention"):
        BudgetSupport(fields=frozenset({"max_tokens"})).check(TokenBudget(retention=0.25))


def test_usage_keeps_its_own_law() -> None:
    assert TokenUsage(native=8, cap=4, used=2).retention == 0.25
    assert TokenUsage(native=0, cap=0, used=0).retention == 1.0
    for native, cap, used in ((4, 5, 1), (4, 2, 3), (4, 2, -1)):
        with pytest.raises(ValueError, match="used <= cap <= native"):
            TokenUsage(native=native, cap=cap, used=used)


@pytest.mark.parametrize("text", ["1e9999999%", "1e9999999/s", "e1e9999999"])
def test_numbers_beyond_all_floats_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        TokenBudget.parse(text)


def test_nothing_is_claimed_by_default() -> None:
    support = BudgetSupport(fields=frozenset())
    assert (support.nested, support.adaptive, support.training_free) == (False, False, False)
    assert TokenUsage(native=1, cap=1, used=1).rounds == 1


def test_budgets_are_values_given_by_keyword() -> None:
    kinds: dict[Any, dict[str, int]] = {TokenBudget: {"max_tokens": 3}, DecodeBudget: {"max_rounds": 3}}
    for kind, value in kinds.items():
        assert hash(kind(**value)) == hash(kind(**value))
        with pytest.raises(TypeError):
            kind(3)
        with pytest.raises(AttributeError):
            setattr(kind(**value), next(iter(value)), 2)


def test_a_choice_below_the_native_count_is_the_nearest() -> None:
    support = BudgetSupport(fields=frozenset({"max_tokens"}), choices=(16, 64))
    with pytest.raises(BudgetError) as caught:
        support.plan([100], 8)
    assert caught.value.nearest == 16
    with pytest.raises(BudgetError) as caught:
        support.plan([12], 8)
    assert caught.value.nearest == 12


def test_the_range_of_a_field_is_said() -> None:
    for field, message in (
        ("retention", "above 0 up to 1; nearest legal value: retention=1"),
        ("tokens_per_second", "a finite number above 0; nearest legal value: tokens_per_second=1"),
        ("target_error", "a finite number from 0; nearest legal value: target_error=0"),
    ):
        with pytest.raises(BudgetError, match=message):
            TokenBudget(**{field: -1.0})  # type: ignore[arg-type]
    assert TokenBudget(target_error=0.0).target_error == 0.0


@pytest.mark.parametrize("value", [True, [64], b"64", object()])
def test_what_is_no_budget_says_what_is(value: object) -> None:
    with pytest.raises(BudgetError, match="a budget of type"):
        TokenBudget.parse(value)  # type: ignore[arg-type]


def test_text_number_mapping_dataclass_and_none_are_budgets_alike() -> None:
    wanted = TokenBudget(max_tokens=64)
    forms: list[BudgetLike] = ["64", 64, {"max_tokens": 64}, wanted]
    assert [TokenBudget.parse(form) for form in forms] == [wanted] * 4
    assert TokenBudget.parse(None) == TokenBudget()
    assert budgets_for(forms, 4) == budgets_for(64, 4) == [wanted] * 4
    with pytest.raises(ValueError, match="3 items but 4 budgets"):
        budgets_for(forms, 3)


def test_a_decoding_budget_is_read_alike_and_never_from_a_token_budget() -> None:
    wanted = DecodeBudget(max_rounds=4)
    assert DecodeBudget.parse({"max_rounds": 4}) == DecodeBudget.parse(wanted) == wanted
    assert DecodeBudget.parse(None) == DecodeBudget()
    for other in (TokenBudget(max_tokens=4), 4, "4"):
        with pytest.raises(BudgetError, match="where a DecodeBudget belongs"):
            DecodeBudget.parse(other)  # type: ignore[arg-type]


def test_an_item_says_what_is_missing() -> None:
    item = ItemSize(seconds=2.0, frames=50)
    assert item.require("frames") == 50
    with pytest.raises(BudgetError, match=r"seconds=2.0, frames=50; allowed: items whose native is known"):
        item.require("native")
    assert sizes_of([7, item]) == [ItemSize(native=7), item]
    with pytest.raises(BudgetError, match="native"):
        BudgetSupport(fields=frozenset()).plan([item])


@pytest.mark.parametrize(
    "change", [{"native": -1}, {"frames": 1.5}, {"height": True}, {"seconds": -1.0}, {"seconds": float("nan")}]
)
def test_an_item_of_impossible_size_raises(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not"):
        ItemSize(**change)  # type: ignore[arg-type]


@given(budgets(floor=1), st.lists(st.tuples(NATIVE, SECONDS), max_size=4))
def test_the_plan_of_a_system_without_a_rule_is_the_cap_of_every_item(
    budget: TokenBudget, items: list[tuple[int, float]]
) -> None:
    support = BudgetSupport(fields=frozenset({"max_tokens", "retention", "tokens_per_second"}))
    sizes = [ItemSize(native=n, seconds=seconds) for n, seconds in items]
    try:
        wanted = [budget.cap(n, seconds) for n, seconds in items]
    except BudgetError:
        with pytest.raises(BudgetError):
            support.plan(sizes, budget)
        return
    assert [(u.native, u.cap, u.used) for u in support.plan(sizes, budget)] == [
        (n, cap, cap) for (n, _), cap in zip(items, wanted, strict=True)
    ]
    assert support.plan(sizes, [budget] * len(sizes)) == support.plan(sizes, budget)
