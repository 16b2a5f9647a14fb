"""Words to tokens: a small vocabulary cut out of a pretrained one, so that its embeddings can be kept and the model
stays small, or the whole one of a published language model.

Not in the paper, which uses all of LLaDA's 126,464 tokens: transcripts are lower-case words, so only tokens of letters
and apostrophes are kept. A byte-pair vocabulary is cut by merge rank (every merge is made of earlier ones, so the cut
is closed); a WordPiece vocabulary by the rank of its list. Four special tokens are appended: MASK, EOS, DELETE (a slot
that leaves no text) and START.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from tokenthrift.config import ConfigError

SPECIAL = ("<|mask|>", "<|end|>", "<|delete|>", "<|start|>")
UNKNOWN = "[UNK]"


def _byte_characters() -> dict[str, int]:
    """The character that a byte-level BPE writes for each byte: itself where it can be seen, one from 256 on if not."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_characters()
_BPE_PIECE = re.compile(r"\u0120?[a-z']+|\u0120")
_WORD_PIECE = re.compile(r"(##)?[a-z']+")


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The tokens of a whole vocabulary that mean more than their text."""

    mask: int
    eos: int
    delete: int


class Vocabulary:
    """Words to token ids and back.

    Args:
        tokenizer: a byte-level BPE or WordPiece tokenizer. A cut vocabulary holds the four special tokens as its last
            ones.
        special: those of a whole vocabulary, which may have more rows than the tokenizer has tokens.
        size: rows of a whole vocabulary.

    Raises:
        ValueError: a cut vocabulary lacks one of them, or an id is not below the number of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, special: SpecialIds | None = None, size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self._encode = lru_cache(maxsize=65_536)(self._encode_word)
        self.piece = lru_cache(maxsize=65_536)(self._piece)
        added = tokenizer.get_added_tokens_decoder()
        self._silent = {i for i, token in added.items() if token.special}
        if special is not None:
            self.size = max(size or 0, tokenizer.get_vocab_size())
            self.mask_id, self.eos_id, self.delete_id = special.mask, special.eos, special.delete
            # A prompt stands before the text, whose last token may be a word: no token but MASK is never written.
            self.start_id = special.mask
            self._silent |= {special.mask, special.eos, special.delete}
            if (highest := max(self._silent)) >= self.size:
                raise ValueError(f"there are {self.size} tokens, so none is {highest}")
            return
        self.size = tokenizer.get_vocab_size()
        found = [i for t in SPECIAL if (i := tokenizer.token_to_id(t)) is not None]
        if len(found) != len(SPECIAL):
            raise ValueError(f"the tokenizer lacks one of {SPECIAL}")
        if (last := max(tokenizer.get_vocab().values())) >= self.size:
            raise ValueError(f"the tokenizer has {self.size} tokens, but ids up to {last}")
        self.mask_id, self.eos_id, self.delete_id, self.start_id = found

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads a `tokenizer.json`.

        Raises:
            ConfigError: it is damaged, or of another vocabulary than `trim` makes.
        """
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # The tokenizers package raises a bare Exception whatever is wrong.
            raise ConfigError(f"{path}: {error}") from error

    def save(self, path: Path) -> None:
        """Writes a `tokenizer.json`."""
        self.tokenizer.save(str(path))

    def word(self, word: str) -> tuple[int, ...]:
        """Token ids of one word of letters and apostrophes."""
        return self._encode(word)

    def source_ids(self, source: Tokenizer) -> list[int]:
        """The ids of a cut vocabulary's tokens, the special ones left out, in the one that it was cut from.

        Raises:
            ValueError: that one lacks a token.
        """
        tokens = [self.tokenizer.id_to_token(i) or "" for i in range(self.size - len(SPECIAL))]
        found = [source.token_to_id(token) for token in tokens]
        if lacking := [token for token, i in zip(tokens, found, strict=True) if i is None]:
            raise ValueError(f"the source of the vocabulary lacks the token {lacking[0]!r}")
        return [i for i in found if i is not None]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it is, special tokens by their names."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str) -> tuple[int, ...]:
        """Token ids of one word with a space before it, or, without it, of the rest of a word."""
        return self.word(text[1:]) if text.startswith(" ") else tuple(self.ids(text))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token writes after those before it, with a leading space where it starts a word; joined and
        stripped they are `text`. A character of several tokens is written by the last of them."""
        out: list[str] = []
        last = ""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            text = "" if token in self._silent else self.tokenizer.id_to_token(token) or ""
            if self._is_bpe:
                piece = decoder.decode(bytes(_BYTES[c] for c in text) if set(text) <= _BYTES.keys() else text.encode())
            elif text == UNKNOWN:
                piece = ""
            else:
                piece = text.removeprefix("##") if text.startswith("##") or not text else f" {text}"
            # BERT's pre-tokenizer parts words at apostrophes.
            glued = not self._is_bpe and (piece == " '" or last == "'")
            out.append(piece[1:] if piece.startswith(" ") and (glued or last == " ") else piece)
            last = out[-1][-1:] or last
        return out

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without surrounding space."""
        return "".join(self.pieces(tokens)).strip()

    def _piece(self, token: int) -> str:
        return self.pieces((token,))[0]

    @property
    def _is_bpe(self) -> bool:
        return type(self.tokenizer.model).__name__ == "BPE"

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(f" {word}" if self._is_bpe else word, add_special_tokens=False).ids)


def _needed_by(tokenizer: Tokenizer, parts: Mapping[str, tuple[str, str]], words: Mapping[str, int]) -> Counter[str]:
    """How many written words need each token of a BPE: as it is, or to be merged into another."""
    counts: Counter[str] = Counter()
    for word, times in words.items():
        needed: set[str] = set()
        queue = list(tokenizer.encode(f" {word}", add_special_tokens=False).tokens)
        while queue:
            token = queue.pop()
            if token in parts and token not in needed:
                needed.add(token)
                queue += parts[token]
        counts.update(dict.fromkeys(needed, times))
    return counts


def trim(source: Path | Tokenizer, size: int, words: Mapping[str, int] | None = None) -> tuple[Vocabulary, list[int]]:
    """Cuts a pretrained tokenizer to lower-case words.

    Args:
        source: a byte-level BPE (Whisper, GPT-2) or WordPiece (BERT) tokenizer, or its file.
        size: most tokens to keep, the four special ones not counted.
        words: how often each word is written. A byte-level BPE then keeps the tokens that most of them need, so that
            most are cut as the language model has learnt to cut them; without it, those of the first merges.

    Returns:
        The vocabulary, and the old id of each kept token in its new order.

    Raises:
        ValueError: the tokenizer is of another kind, or `size` leaves no room for the letters.
    """
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source.to_str()
    data, named = json.loads(text), source if isinstance(source, Path) else "this tokenizer"
    old: dict[str, int] = data["model"]["vocab"]
    kind = data["model"]["type"]
    if not (kind == "BPE" and "\u0120" in old) and not (kind == "WordPiece" and UNKNOWN in old):
        raise ValueError(f"{named} is neither a byte-level BPE nor a WordPiece tokenizer: {kind}")
    if kind == "BPE":
        kept = [t for t in old if len(t) == 1 and _BPE_PIECE.fullmatch(t)]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
        parts = {a + b: (a, b) for a, b in pairs if _BPE_PIECE.fullmatch(a + b) and a + b in old}
        made = list(parts)
        if words is not None:
            needed_by = _needed_by(Tokenizer.from_str(text), parts, words)
            # Words that need a token need its parts too, and these come first in `parts`: the cut stays closed.
            chosen = set(sorted(made, key=lambda token: -needed_by[token])[: size - len(kept)])
            made = [token for token in made if token in chosen]
        made = made[: size - len(kept)]
        kept = list(dict.fromkeys([*kept, *made]))
        data["model"]["merges"] = [list(parts[token]) for token in made]
    else:
        letters = [t for t in old if len(t.removeprefix("##")) == 1 and _WORD_PIECE.fullmatch(t)]
        pieces = [t for t in old if _WORD_PIECE.fullmatch(t)]
        kept = list(dict.fromkeys([*letters, UNKNOWN, *pieces]))[:size]
    needed = {*"abcdefghijklmnopqrstuvwxyz'", "\u0120" if kind == "BPE" else UNKNOWN}
    if len(kept) > size or not needed.issubset(kept):
        raise ValueError(f"{size} tokens of {named} do not hold every letter and the apostrophe")
    data["model"]["vocab"] = {t: i for i, t in enumerate([*kept, *SPECIAL])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] = [{"id": len(kept) + i, "content": t, **flags} for i, t in enumerate(SPECIAL)]
    data["post_processor"], data["truncation"], data["padding"] = None, None, None
    return Vocabulary(Tokenizer.from_str(json.dumps(data))), [old[t] for t in kept]
