"""Plain data to configuration dataclasses and back: what a model folder's ``config.json`` may hold.

A configuration is a dataclass of numbers, strings, booleans, lists and further such dataclasses. It is read by its
annotations and by nothing else: the file never names a class or a function, so reading one cannot run code. Types are
checked here; ranges are checked by the dataclass itself in ``__post_init__``, before anybody allocates a tensor.
Hugging Face's mixin drops fields it does not know; here an unknown field raises, because a misspelt one would
otherwise silently be the default.
"""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used: what is wrong, where, and what is allowed."""


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raises a ConfigError that names a number out of its range."""
    if not low <= value <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, got {value}")


def load_json(path: Path) -> Any:
    """Reads whatever a JSON file holds.

    Raises:
        ConfigError: the file is not JSON (NaN and Infinity are not).
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        ConfigError: the file is not JSON, or holds something other than an object.
    """
    data = load_json(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object, found {_describe(data)}")
    return data


def from_plain(kind: type[T], data: object, where: str = "config") -> T:
    """Builds a dataclass from plain data.

    Args:
        kind: a dataclass whose fields are int, float, bool, str, None, Literal, list, tuple, dict with string keys,
            unions of these, or further dataclasses.
        data: a mapping from field names to values; fields with a default may be left out.
        where: how error messages call the data.

    Raises:
        ConfigError: an unknown or missing field, a value of another type, or one that the dataclass itself refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected an object for {kind.__name__}, found {_describe(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown field {name!r}; {hint}")
    missing = [
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing field {', '.join(map(repr, missing))}")
    hints = get_type_hints(kind)
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def to_plain(value: object) -> Any:
    """The inverse of :func:`from_plain`: dictionaries, lists and scalars, ready for JSON, YAML or a checkpoint.

    Raises:
        ConfigError: something in the value has no plain form (NaN and infinities have none in JSON).
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    raise ConfigError(f"{_describe(value)} has no plain form")


def _convert(hint: Any, value: object, where: str) -> Any:
    """One value by its annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        # 1 == True and 1 == 1.0 in Python, so equality alone would let another type through.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise ConfigError(f"{where}: expected one of {', '.join(map(repr, arguments))}, found {value!r}")
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)
    if hint is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if (hint in (int, str, bool) and type(value) is hint) or (hint is type(None) and value is None):
        return value
    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise ConfigError(f"{where}: expected {expected}, found {_describe(value)}")


def _convert_union(choices: tuple[Any, ...], value: object, where: str) -> Any:
    """The first member of a union that takes the value; the exact scalar type goes first (1 in int | float)."""
    problems = []
    for choice in sorted(choices, key=lambda choice: type(value) is not choice):
        try:
            return _convert(choice, value, where)
        except ConfigError as error:
            problems.append((choice, str(error)))
    # With `X | None` the complaint about None says nothing; X's own says what to change.
    useful = [problem for choice, problem in problems if choice is not type(None)]
    raise ConfigError("; or ".join(useful))


def _convert_sequence(origin: type, arguments: tuple[Any, ...], value: object, where: str) -> Any:
    """A list, a tuple of any length (``tuple[T, ...]``) or a tuple of a fixed one."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, found {_describe(value)}")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{where}: expected {len(arguments)} items, found {len(value)}")
        hints: tuple[Any, ...] = arguments
    else:
        hints = (arguments[0],) * len(value)
    return origin(
        _convert(hint, item, f"{where}[{index}]") for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _describe(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
