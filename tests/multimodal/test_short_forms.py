"""The nearest legal value that an error of a budget names: what a person most likely meant."""

import json
from typing import Any

import pytest

from tokenthrift.budget import (
    BudgetError,
    TokenBudget,
)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("0.5", "50%"),
        (0.25, "25%"),
        ("64.5", "64"),
        ("1.0", "100%"),
        ("1.5", "1"),
        ("0.0", "1"),
        ("-3.5", "1"),
        ("many", "100%"),
        ("inf", "100%"),
        ("64t", "64"),
        ("1 token", "1"),
        ("max_tokens=64", "64"),
        ("12.5s", "12.5/s"),
        ("12.5 / s", "12.5/s"),
        ("12.5 tokens per second", "12.5/s"),
        ("25 percent", "25%"),
        ("1/2", "50%"),
        ("error=0.05", "e0.05"),
        ({"max_tokens": "64"}, '{"max_tokens": 64}'),
        ({"max_tokens": 64.5}, '{"max_tokens": 64}'),
        ({"retention": "25%"}, '{"retention": 0.25}'),
        ({"target_error": "0.1"}, '{"target_error": 0.1}'),
    ],
)
def test_the_nearest_legal_value_is_near(text: Any, nearest: str) -> None:
    with pytest.raises(BudgetError) as caught:
        TokenBudget.parse(text)
    if isinstance(text, dict):  # the error of a field names the field
        (name,), value = text, json.loads(nearest)
        assert caught.value.nearest == f"{name}={value[name]:g}"
    else:
        assert caught.value.nearest == nearest
    TokenBudget.parse(nearest)
