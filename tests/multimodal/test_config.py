"""Plain data to dataclasses and back."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.config import ConfigError, from_plain, read_json, to_plain


@dataclass(frozen=True)
class Encoder:
    width: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 4096:
            raise ConfigError(f"width must be within 1 and 4096, not {self.width}")
        if self.dropout == 1.0:
            raise ValueError("dropout of 1 leaves nothing")


@dataclass(frozen=True)
class Config:
    name: str
    encoder: Encoder
    kind: Literal["a", "b", 1] = "a"
    rates: tuple[int, ...] = ()
    size: tuple[int, float] = (1, 1.0)
    limit: int | None = None
    tags: list[str] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    extra: Encoder | None = None
    causal: bool = False


SMALL: dict[str, Any] = {"name": "x", "encoder": {"width": 8}}
finite = st.floats(allow_nan=False, allow_infinity=False)
encoders = st.builds(Encoder, st.integers(1, 4096), finite.filter(lambda value: value != 1.0))
configs = st.builds(
    Config,
    name=st.text(),
    encoder=encoders,
    kind=st.sampled_from(("a", "b", 1)),
    rates=st.lists(st.integers()).map(tuple),
    size=st.tuples(st.integers(), finite),
    limit=st.none() | st.integers(),
    tags=st.lists(st.text()),
    shares=st.dictionaries(st.text(), finite),
    extra=st.none() | encoders,
    causal=st.booleans(),
)


@given(configs)
@settings(deadline=None, max_examples=60)
def test_round_trip_through_json(config: Config) -> None:
    assert from_plain(Config, json.loads(json.dumps(to_plain(config)))) == config


def test_defaults_may_be_left_out() -> None:
    assert from_plain(Config, SMALL) == Config(name="x", encoder=Encoder(8))


def test_whole_numbers_are_floats_where_floats_are_wanted() -> None:
    dropout = from_plain(Encoder, {"width": 8, "dropout": 0}).dropout
    assert type(dropout) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "y"}, r"unknown field 'nam'; did you mean 'name'\?"),
        ({"zzzzzz": 1}, "known fields: name, encoder"),
        ({"encoder": {}}, r"config.encoder: missing field 'width'"),
        ({"encoder": {"width": 8.0}}, r"config.encoder.width: expected int, found float 8.0"),
        ({"encoder": {"width": True}}, "expected int, found bool True"),
        ({"encoder": {"width": 10**12}}, "within 1 and 4096"),
        ({"encoder": {"width": 8, "dropout": 1}}, "config.encoder: dropout of 1"),
        ({"encoder": [8]}, "expected an object for Encoder, found list"),
        ({"name": None}, "config.name: expected str, found NoneType"),
        ({"kind": "c"}, "expected one of 'a', 'b', 1"),
        ({"kind": True}, "expected one of 'a', 'b', 1"),
        ({"rates": 3}, "config.rates: expected a list"),
        ({"rates": [1, "2"]}, r"config.rates\[1\]: expected int"),
        ({"size": [1]}, "expected 2 items, found 1"),
        ({"limit": "3"}, "config.limit: expected int, found str '3'$"),
        ({"extra": {"width": 0}}, "within 1 and 4096"),
        ({"shares": {"a": "b"}}, "config.shares.a: expected float"),
        ({"causal": 0}, "expected bool, found int 0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_plain(Config, {**SMALL, **change})


def test_missing_fields_are_all_named() -> None:
    with pytest.raises(ConfigError, match="missing field 'name', 'encoder'"):
        from_plain(Config, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), Encoder])
def test_what_json_cannot_hold_has_no_plain_form(value: object) -> None:
    with pytest.raises(ConfigError, match="has no plain form"):
        to_plain([value])


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": NaN}', '{"a": Infinity}', '{"a": ' * 100_000])
def test_files_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        read_json(path)
