"""Lazy packages and old names."""

import sys
import types

import pytest

from tokenthrift.lazy import attach, deprecated


def test_public_names_come_from_their_submodules_and_old_names_warn() -> None:
    find, names, public = attach("tokenthrift", {"TokenBudget": "budget"}, renamed={"Budget": "TokenBudget"})
    from tokenthrift.budget import TokenBudget

    assert public == ["TokenBudget"]
    assert names() == ["TokenBudget"]
    assert find("TokenBudget") is TokenBudget
    with pytest.raises(AttributeError, match="Nothing"):
        find("Nothing")


def test_an_old_name_warns_and_is_the_new_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("plain_module_of_this_test")
    module.new = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    find = deprecated(module.__name__, {"old": "new", "budget": "tokenthrift.budget:TokenBudget"})
    with pytest.warns(DeprecationWarning, match="old is now plain_module_of_this_test.new"):
        assert find("old") is module.new
    from tokenthrift.budget import TokenBudget

    with pytest.warns(DeprecationWarning, match=r"is now tokenthrift\.budget\.TokenBudget"):
        assert find("budget") is TokenBudget
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        find("other")
