"""Packages whose public names are imported at first use, and old names that still work.

`lazy_loader` (scientific-python/lazy_loader, SPEC 1) does the work; the command line then needs no torch. What differs:
the names are given as name: submodule, which is how an `__init__` reads best, and a renamed public thing is found under
its old name with a DeprecationWarning for one release.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lazy_loader

from tokenthrift.extras import naming_extras

__all__ = ["attach", "deprecated"]

Getattr = Callable[[str], Any]


def attach(
    package: str, names: Mapping[str, str], *, renamed: Mapping[str, str] | None = None
) -> tuple[Getattr, Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: its `__name__`.
        names: every public name, and the submodule that it lives in. One that needs an extra which is not installed
            raises MissingExtraError when it is asked for.
        renamed: old public names, and the public names that they are called now.
    """
    submodules: dict[str, list[str]] = {}
    for name, module in names.items():
        submodules.setdefault(module, []).append(name)
    load, list_names, public = lazy_loader.attach(package, submod_attrs=submodules)

    def find(name: str) -> Any:
        with naming_extras():
            return load(name)

    return deprecated(package, renamed or {}, find), list_names, public


def deprecated(module: str, renamed: Mapping[str, str], otherwise: Getattr | None = None) -> Getattr:
    """A module's `__getattr__` that knows old names.

    Args:
        module: its `__name__`.
        renamed: old names, and what they are called now in the same module, or as `module:name` in another.
        otherwise: finds all other names.
    """

    def find(name: str) -> Any:
        if name in renamed:
            home, _, now = renamed[name].rpartition(":")
            warnings.warn(f"{module}.{name} is now {home or module}.{now}", DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(home or module), now)
        if otherwise is not None:
            return otherwise(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
