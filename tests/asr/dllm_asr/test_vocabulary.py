"""Vocabularies cut out of byte-level BPE and WordPiece tokenizers: closed, small, and still able to write any word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.asr.tiny_dllm import LINES, write_bpe, write_wordpiece
from tokenthrift.config import ConfigError
from tokenthrift.dllm_asr.vocabulary import SPECIAL, Vocabulary, trim

KINDS: dict[str, Callable[[Path], Path]] = {
    "bpe": write_bpe,
    "bpe, merges as strings": lambda path: write_bpe(path, merges_as_strings=True),
    "wordpiece": write_wordpiece,
}
WORD = st.from_regex(r"[a-z]{1,12}('[a-z]{1,3})?", fullmatch=True)
few = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer_json(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def vocabulary(tokenizer_json: Path) -> Vocabulary:
    return trim(tokenizer_json, 90)[0]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json")


@given(words=st.lists(WORD, max_size=6))
@few
def test_any_words_come_back(vocabulary: Vocabulary, words: list[str]) -> None:
    ids = [i for word in words for i in vocabulary.word(word)]
    assert all(0 <= i < vocabulary.size - len(SPECIAL) for i in ids)
    assert vocabulary.text(ids) == " ".join(words)


@given(data=st.data())
@few
def test_pieces_of_any_tokens_join_to_their_text(vocabulary: Vocabulary, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, vocabulary.size - 1), max_size=12))
    pieces, text = vocabulary.pieces(ids), vocabulary.text(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).strip() == text
    assert "  " not in text
    for token in (vocabulary.mask_id, vocabulary.eos_id, vocabulary.delete_id, vocabulary.start_id):
        assert vocabulary.text([*ids[:3], token, *ids[3:]]) == text


def test_special_tokens_are_the_last_four(vocabulary: Vocabulary) -> None:
    last = [vocabulary.mask_id, vocabulary.eos_id, vocabulary.delete_id, vocabulary.start_id]
    assert last == list(range(vocabulary.size - 4, vocabulary.size))
    assert [vocabulary.tokenizer.id_to_token(i) for i in last] == list(SPECIAL)


def test_rows_to_keep_hold_the_same_tokens(tokenizer_json: Path) -> None:
    vocabulary, keep = trim(tokenizer_json, 90)
    whole = Tokenizer.from_file(str(tokenizer_json))
    assert len(keep) == len(set(keep)) == vocabulary.size - 4 <= 90
    assert [whole.id_to_token(i) for i in keep] == [vocabulary.tokenizer.id_to_token(i) for i in range(len(keep))]


def test_a_larger_vocabulary_needs_no_more_tokens(tokenizer_json: Path) -> None:
    small, large = (trim(tokenizer_json, size)[0] for size in (65, 10_000))
    assert small.size < large.size
    words = ["there", "the", "number", "lazy", "dog", "don't", "they'd"]
    assert sum(len(small.word(w)) for w in words) > sum(len(large.word(w)) for w in words)
    assert [small.text(list(small.word(w))) for w in words] == [large.text(list(large.word(w))) for w in words] == words


def test_all_lower_case_tokens_encode_as_before(tokenizer_json: Path) -> None:
    vocabulary, keep = trim(tokenizer_json, 10_000)
    whole = Tokenizer.from_file(str(tokenizer_json))
    for word in ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "number", "unheard"]:
        before = whole.encode(f" {word}", add_special_tokens=False).ids
        assert [keep[i] for i in vocabulary.word(word)] == before


@given(
    words=st.dictionaries(st.sampled_from(LINES).flatmap(lambda line: st.sampled_from(line.split())), st.integers(1, 9))
)
@few
def test_words_choose_the_tokens_that_they_need(bpe: Path, words: dict[str, int]) -> None:
    """However few there are, each token that is kept can be made of others that are kept; enough of them cut the words
    as the whole tokenizer does."""
    words = {word: times for word, times in words.items() if re.fullmatch("[a-z']+", word)}
    whole = Tokenizer.from_file(str(bpe))
    small, keep = trim(bpe, 70, words)
    assert len(keep) <= 70
    for token in small.tokenizer.get_vocab():
        assert token in SPECIAL or small.tokenizer.model.tokenize(token)[0].value == token
    large, keep = trim(bpe, 200, words)
    for word in words:
        assert small.text(small.word(word)) == word
        assert [keep[i] for i in large.word(word)] == whole.encode(f" {word}", add_special_tokens=False).ids


def test_the_words_that_are_written_most_come_first(bpe: Path) -> None:
    def cut(words: dict[str, int]) -> tuple[int, int]:
        vocabulary = trim(bpe, 31, words)[0]
        return len(vocabulary.word("number")), len(vocabulary.word("jumps"))

    (number, jumps), (number_before, jumps_before) = cut({"number": 9, "jumps": 1}), cut({"number": 1, "jumps": 9})
    assert number < number_before
    assert jumps > jumps_before


def test_saved_and_loaded_it_is_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "tokenizer.json")
    loaded = Vocabulary.load(tmp_path / "tokenizer.json")
    assert loaded.tokenizer.get_vocab() == vocabulary.tokenizer.get_vocab()
    assert [loaded.word(w) for w in ("there", "don't")] == [vocabulary.word(w) for w in ("there", "don't")]


def test_too_small_a_size_is_refused(tokenizer_json: Path) -> None:
    with pytest.raises(ValueError, match="20 tokens of .* do not hold every letter"):
        trim(tokenizer_json, 20)


def test_other_tokenizers_are_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    data = json.loads(tokenizer_json.read_text())
    marker = "\u0120" if data["model"]["type"] == "BPE" else "[UNK]"
    data["model"]["vocab"] = {token.replace(marker, "\u2581"): i for token, i in data["model"]["vocab"].items()}
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="neither a byte-level BPE nor a WordPiece tokenizer"):
        trim(other, 90)


def test_a_tokenizer_that_was_not_cut_is_refused(tokenizer_json: Path) -> None:
    with pytest.raises(ValueError, match="lacks one of"):
        Vocabulary.load(tokenizer_json)


@pytest.mark.parametrize("content", ["{}", "", "not JSON", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: ")):
        Vocabulary.load(path)


def test_an_id_beyond_the_embedding_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    data = json.loads(vocabulary.tokenizer.to_str())
    data["model"]["vocab"]["a"] = vocabulary.size + 7
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}.* ids up to {vocabulary.size + 7}"):
        Vocabulary.load(path)
