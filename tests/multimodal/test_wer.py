"""Error rates: counts known by hand, laws that hold for any texts, and Whisper's normaliser on what it is there for."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.evaluation.wer import ErrorCount, character_errors, normalize_english, word_errors
from tokenthrift.extras import MissingExtraError

texts = st.lists(st.sampled_from(["one", "two", "three", "four"]), max_size=6).map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=5)


def test_counts_by_hand() -> None:
    count = word_errors(["the cat sat down"], ["the bat sat down down"], str)
    assert (count.hits, count.substitutions, count.deletions, count.insertions) == (3, 1, 0, 1)
    assert count.total == 4
    assert count.rate == pytest.approx(0.5)
    assert character_errors(["abcd"], ["abd"], str).rate == pytest.approx(0.25)


def test_corpus_rate_is_not_the_mean_of_clips() -> None:
    count = word_errors(
        ["yes", "one two three four five six seven eight nine"],
        ["no", "one two three four five six seven eight nine"],
        str,
    )
    assert count.rate == pytest.approx(0.1)


def test_english_forms_that_count_as_equal() -> None:
    assert word_errors(["Mr. Brown's colour: twenty-one, it's OK!"], ["mister brown's color 21 it is ok"]).errors == 0
    assert normalize_english("[laughs] Um, hello") == "hello"


def test_empty_sides() -> None:
    assert word_errors([], []) == ErrorCount()
    assert word_errors([""], [""]).rate == 0.0
    assert word_errors(["", "a b"], ["x", "a"], str) == ErrorCount(hits=1, deletions=1, insertions=1)
    assert word_errors([""], ["invented words"], str).rate == float("inf")


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        word_errors(["a", "b"], ["a"], str)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtraError, match=r"tokenthrift\[evaluation\]"):
        word_errors(["a"], ["a"], str)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_corpus_is_the_sum_of_its_parts(items: list[tuple[str, str]]) -> None:
    references, hypotheses = [r for r, _ in items], [h for _, h in items]
    parts = sum((word_errors([r], [h], str) for r, h in items), ErrorCount())
    whole = word_errors(references, hypotheses, str)
    assert (whole.errors, whole.total) == (parts.errors, parts.total)
    assert whole.total == sum(len(r.split()) for r in references)
    assert whole.hits + whole.substitutions + whole.insertions == sum(len(h.split()) for h in hypotheses)


@settings(deadline=None, max_examples=40)
@given(texts, texts)
def test_errors_are_a_distance(first: str, second: str) -> None:
    assert word_errors([first], [first], str).errors == 0
    assert word_errors([first], [second], str).errors == word_errors([second], [first], str).errors
    assert (word_errors([first], [second], str).errors == 0) == (first == second)
