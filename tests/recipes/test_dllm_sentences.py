"""Sentences to be spoken: numbers in words, training targets, and a collection without repeats."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes.dllm_scripts import run, script

few = settings(deadline=None, max_examples=25)
sentences = script("sentences")


def number_of(words: str) -> int:
    """The number that English words mean."""
    total = part = 0
    for word in words.split():
        if word in sentences.UNITS:
            part += sentences.UNITS.index(word)
        elif word in sentences.TENS:
            part += 10 * sentences.TENS.index(word)
        elif word == "hundred":
            part *= 100
        else:
            total, part = total + part * {"thousand": 1000, "million": 10**6}[word], 0
    return total + part


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (85, "eighty five"),
        (100, "one hundred"),
        (110, "one hundred ten"),
        (999, "nine hundred ninety nine"),
        (1000, "one thousand"),
        (40_015, "forty thousand fifteen"),
        (2_000_001, "two million one"),
    ],
)
def test_cardinals(number: int, words: str) -> None:
    assert sentences.cardinal(number) == words


@given(st.integers(0, 10**9 - 1))
@few
def test_cardinals_mean_their_number(number: int) -> None:
    words = sentences.cardinal(number)
    assert number_of(words) == number
    assert sentences.normalize(words) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "first"),
        (2, "second"),
        (3, "third"),
        (4, "fourth"),
        (5, "fifth"),
        (8, "eighth"),
        (9, "ninth"),
        (12, "twelfth"),
        (20, "twentieth"),
        (21, "twenty first"),
        (100, "one hundredth"),
        (1012, "one thousand twelfth"),
    ],
)
def test_ordinals(number: int, words: str) -> None:
    assert sentences.ordinal(number) == words


@given(st.integers(1, 10**6))
@few
def test_an_ordinal_changes_the_last_word_of_the_cardinal(number: int) -> None:
    *head, last = sentences.ordinal(number).split()
    assert head == sentences.cardinal(number).split()[:-1]
    assert re.search("(first|second|third|th)$", last)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1984, "nineteen eighty four"),
        (1905, "nineteen oh five"),
        (1900, "nineteen hundred"),
        (2000, "two thousand"),
        (2006, "two thousand and six"),
        (2010, "twenty ten"),
        (1500, "fifteen hundred"),
    ],
)
def test_years(number: int, words: str) -> None:
    assert sentences.year(number) == words


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("Hello, World!", "hello world"),
        ("Don't stop; it\u2019s OK.", "don't stop it's ok"),
        ("'quoted' words", "quoted words"),
        ("the dogs' bowls", "the dogs bowls"),
        ("well-known \u2013 and/or", "well known and or"),
        ("rock 'n' roll", "rock n roll"),
        ("\uff21bc", "abc"),
        ("42 dogs", None),
        ("caf\u00e9", None),
        ("5 %", None),
        ("...", None),
        ("", None),
    ],
)
def test_targets(written: str, target: str | None) -> None:
    assert sentences.normalize(written) == target


@given(st.text(alphabet="abzAZ' -.,!?\u2019\u2014/1\u00e9\n\t\"", max_size=20) | st.text(max_size=12))
@few
def test_targets_are_words_and_stay_as_they_are(text: str) -> None:
    target = sentences.normalize(text)
    if target is not None:
        assert re.fullmatch(r"[a-z]+('[a-z]+)*( [a-z]+('[a-z]+)*)*", target)
        assert sentences.normalize(target) == target


def test_generated_texts_can_be_targets() -> None:
    made = list(sentences.generated(210, random.Random(0), ["Baker", "Elm"]))
    assert made == list(sentences.generated(210, random.Random(0), ["Baker", "Elm"]))
    kinds = [kind for kind, _ in made[:7]]
    assert kinds == ["number", "date", "time", "address", "phone", "amount", "spelled"]
    assert all(sentences.normalize(text) for _, text in made)
    assert len({text for _, text in made}) > 150


def test_two_per_cent_are_for_development() -> None:
    splits = [sentences.split_of(f"sentence {i}") for i in range(3000)]
    assert splits == [sentences.split_of(f"sentence {i}") for i in range(3000)]
    assert 0.01 < splits.count("dev") / len(splits) < 0.03


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """A WordNet of four lines and a cookie file."""
    wordnet, fortunes = tmp_path / "wordnet", tmp_path / "fortunes"
    wordnet.mkdir()
    fortunes.mkdir()
    glosses = {
        "noun": 'a domestic animal (Canis); man\'s friend; "the dog barked all night"; "walk the old Dog Baker today"',
        "verb": 'move fast; "he ran"; "the USA won"',
        "adj": 'of low height; "a 2nd row"',
        "adv": "in haste",
    }
    for part, gloss in glosses.items():
        licence = "  1 This software | and database\n"
        (wordnet / f"data.{part}").write_text(f"{licence}00001740 03 n 01 entity 0 000 | {gloss}\n")
    (fortunes / "wisdom").write_text("Time flies. Fruit does not.\n\t\t-- Anon\n%\nLook before\nyou leap!\n%\n")
    (fortunes / "wisdom.dat").write_bytes(b"\0")
    (fortunes / "zippy").write_text("Are we having fun yet?\n%\n")
    return wordnet, fortunes


def test_sentences_are_collected_once_and_in_a_seeded_order(texts: tuple[Path, Path]) -> None:
    rows = list(sentences.collect(*texts, 0))
    assert rows == list(sentences.collect(*texts, 0))
    assert [row["id"] for row in rows] == [f"{i:06d}" for i in range(len(rows))]
    found = {row["text"]: row for row in rows}
    assert len(found) == len(rows) > 3000
    by_source = {s: {r["text"] for r in rows if r["source"] == s} for s in ("wordnet", "definition", "fortune")}
    assert by_source["wordnet"] == {"the dog barked all night", "walk the old dog baker today", "he ran"}
    assert by_source["definition"] == {"a domestic animal", "move fast", "of low height", "in haste"}
    assert by_source["fortune"] == {"time flies", "fruit does not", "look before you leap"}
    assert found["look before you leap"]["spoken"] == "Look before you leap!"
    for text, row in found.items():
        assert row["split"] == sentences.split_of(text)
        assert sentences.normalize(row["spoken"]) == text
        assert len(text.split()) <= 40
    assert [r["text"] for r in rows] != [r["text"] for r in sentences.collect(*texts, 1)]


def test_sentences_are_written_one_a_line(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sentences.jsonl"
    run(monkeypatch, sentences, out, "--wordnet", texts[0], "--fortunes", texts[1])
    assert [json.loads(line) for line in out.read_text().splitlines()] == list(sentences.collect(*texts, 0))
    assert "'fortune': 3" in capsys.readouterr().out
