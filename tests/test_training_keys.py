"""docs/training_keys.md has every key that a recipe gives: its class is on the page, and a docstring names the key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from tokenthrift.registry import resolve

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "training_keys.md").read_text(encoding="utf-8")


def classes(node: Any) -> Iterator[tuple[type, dict[str, Any]]]:
    """Every class of ours that a recipe names, with its arguments."""
    if isinstance(node, dict) and str(node.get("class_path", "")).startswith("tokenthrift."):
        module, _, name = node["class_path"].rpartition(".")
        yield resolve(f"{module}:{name}"), node.get("init_args") or {}
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from classes(part)


def arguments(kind: type, given: dict[str, Any]) -> Iterator[tuple[type, str]]:
    """Every key with the class that reads it; those of dataclasses inside too."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        if base.__module__.startswith("tokenthrift."):
            hints |= get_type_hints(base if dataclasses.is_dataclass(base) else base.__init__)  # type: ignore[misc]
    for key, value in given.items():
        yield kind, key
        hint = hints.get(key)
        inner = [own for own in (hint, *get_args(hint)) if isinstance(own, type) and dataclasses.is_dataclass(own)]
        if inner and isinstance(value, dict):
            # A mapping of names to such classes, or one of them.
            for own in value.values() if get_origin(hint) in (dict, Mapping) else [value]:
                yield from arguments(inner[0], own)


def documented(kind: type) -> dict[str, type]:
    """Arguments and fields that a docstring names, and the class whose docstring it is."""
    found: dict[str, type] = {}
    for base in reversed(kind.__mro__[:-1]):
        if not base.__module__.startswith("tokenthrift."):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
                found[field.target.id] = base
        docs = f"{inspect.getdoc(base)}\n{inspect.getdoc(base.__init__)}"  # type: ignore[misc]
        found |= dict.fromkeys(re.findall(r"^\s+(\w+): ", docs, re.MULTILINE), base)
    return found


def test_every_key_of_every_recipe_is_on_the_page() -> None:
    seen = {
        pair
        for path in (ROOT / "recipes").glob("*/*.yaml")
        for kind, given in classes(yaml.safe_load(path.read_text(encoding="utf-8")))
        for pair in arguments(kind, given)
    }
    assert len(seen) > 150
    words = {kind: documented(kind) for kind in {kind for kind, _ in seen}}
    assert [f"{kind.__name__}.{key}" for kind, key in seen if key not in words[kind]] == []
    owners = {words[kind][key] for kind, key in seen}
    assert [own for own in owners if f"::: {own.__module__}.{own.__name__}\n" not in PAGE] == []
