"""What a command line means to the program that it calls, without running it: the parsers are the programs' own.

`parse_args` is replaced by itself and an exception, which ends a command once its words are understood. A recipe of
`tokenthrift fit` is read from its files and flags and held against the signatures of the classes that it names, since
Lightning's parser takes seconds to build.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from lightning import Trainer

from tokenthrift.cli import main
from tokenthrift.config import from_plain
from tokenthrift.registry import resolve

SWITCHES = {"help", "print_config"}  # of `tokenthrift fit`, without a value
FIT = {"seed_everything", "trainer", "model", "data", "ckpt_path"}


class ParsedError(Exception):
    """The arguments of a command that was understood."""


def parsed(run: Callable[[], Any], *, whole: bool = True) -> argparse.Namespace:
    """The arguments that a program reads from its command line.

    Args:
        run: calls the program.
        whole: whether required arguments may not be missing.

    Raises:
        AssertionError: the program does not understand them; the text is its own.
    """
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        for action in self._actions:
            action.required &= whole
        found = real(self, args, namespace)
        if self.prog == "tokenthrift evaluate":  # hands over to the parser of a system
            return found
        raise ParsedError(found)

    def fail(self: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "error", fail)
        try:
            run()
        except ParsedError as done:
            return done.args[0]  # type: ignore[no-any-return]
        except SystemExit as shown:
            if not shown.code:  # after --help
                return argparse.Namespace()
    raise AssertionError("it reads no arguments")


def command(words: Sequence[str], **options: bool) -> argparse.Namespace:
    """The arguments of a command of `tokenthrift`."""
    return parsed(lambda: main(words), **options)


@contextmanager
def siblings(folder: Path) -> Iterator[None]:
    """Scripts of a recipe import each other by their bare names, which those of another recipe have too."""
    names = {path.stem for path in folder.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def script(path: Path, words: Sequence[str], **options: bool) -> argparse.Namespace:
    """The arguments of a script; one without a parser takes as many words as it is given."""
    if "argparse" not in path.read_text(encoding="utf-8") and "options(" not in path.read_text(encoding="utf-8"):
        assert not any(word.startswith("-") for word in words)
        return argparse.Namespace(out=Path(words[-1]) if words else None)
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch, siblings(path.parent):
        patch.setattr(sys, "argv", [path.name, *words])
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return parsed(module.main, **options)


def value_of(text: str) -> Any:
    """A flag's value, in which numbers may be written 2e-3."""
    try:
        return float(text) if "e" in text else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def merged(below: Any, above: Any) -> Any:
    """Two recipes, the second over the first."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: merged(below.get(key), value) for key, value in above.items()}
    return above


def recipe(words: Sequence[str], root: Path) -> dict[str, Any]:
    """What `tokenthrift fit WORDS` would run: recipes, each over those before, and then flags.

    Raises:
        AssertionError: words without an option, or an option without a value.
    """
    found: dict[str, Any] = {}
    flags: list[tuple[str, Any]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        assert word.startswith("--"), f"{word!r} is no option"
        if word[2:] in SWITCHES:
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            assert rest, f"{word} has no value"
            value = rest.pop(0)
        if name == "config" and value.isupper():  # RECIPE, in a text about any
            continue
        if name == "config":
            found = merged(found, yaml.safe_load((root / value).read_text(encoding="utf-8")))
        else:
            flags.append((name, value_of(value)))
    for name, value in flags:
        keys = name.split(".")
        if keys[0] in ("model", "data") and keys[1:2] not in (["init_args"], ["class_path"]):
            keys.insert(1, "init_args")
        place: Any = found
        for key in keys[:-1]:
            if place.get(key) is None:
                place[key] = {}
            # Of a list, Lightning takes the last.
            place = place[key][-1] if isinstance(place[key], list) else place[key]
        if keys[-1].endswith("+"):
            place.setdefault(keys[-1][:-1], []).append({"class_path": value})
        else:
            place[keys[-1]] = value
    return found


def check_recipe(run: dict[str, Any]) -> None:
    """Raises an AssertionError for a key that nothing reads, or a ConfigError for a value of another type."""
    assert set(run) <= FIT, set(run) - FIT
    if "model" not in run:  # a text about any recipe
        return
    trainer = dict(run["trainer"])
    unknown = set(trainer) - set(inspect.signature(Trainer.__init__).parameters)
    assert not unknown, unknown
    callbacks = trainer.get("callbacks") or []
    for part in (run["model"], run["data"], *(callbacks if isinstance(callbacks, list) else [callbacks])):
        module, _, name = part["class_path"].rpartition(".")
        kind, given = resolve(f"{module or 'lightning.pytorch.callbacks'}:{name}"), part.get("init_args") or {}
        known = {key for base in kind.__mro__ for key in inspect.signature(base.__init__).parameters}
        assert set(given) <= known, f"{name}: {set(given) - known}"
        hints = get_type_hints(kind.__init__) if module.startswith("tokenthrift") else {}
        for key, value in given.items():
            if isinstance(hints.get(key), type) and dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
                from_plain(hints[key], value, key)
