"""Words of a transcript from its tokens: what stands between spaces, or a token where a script has none.

Chinese, Japanese, Thai and their like are written without spaces. There each token of a recognizer, a character or a
few, is a word, as in openai-whisper; marks stay with the word before them. WhisperX puts spaces between the characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

from tokenthrift.transcript import TranscriptToken, Word

__all__ = [
    "ends_sentence",
    "joined_words",
    "match_tokens",
    "parts_words",
    "split_words",
    "token_groups",
    "words_of_tokens",
]

# Thai and Lao, Burmese, Khmer, kana, Han with its extensions, and full-width marks, behind which no space stands.
_UNSPACED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\uff66-\uff9f\U00020000-\U0003ffff]"
)
_OPENING: Final = ("Ps", "Pi")


def parts_words(before: str, after: str) -> bool:
    """Whether two characters that touch are of two words: of a script without spaces, and the second no mark."""
    kind = unicodedata.category(after)
    leans = kind == "Lm" or kind[0] not in "LN" and kind not in _OPENING
    if leans or unicodedata.category(before) in _OPENING:
        return False
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def split_words(text: str) -> list[str]:
    """The words of a text without tokens; in a script without spaces each character is one."""
    words: list[str] = []
    for part in text.split():
        start = 0
        for at in range(1, len(part)):
            if parts_words(part[at - 1], part[at]):
                words.append(part[start:at])
                start = at
        words.append(part[start:])
    return words


def ends_sentence(word: str) -> bool:
    """Whether a word carries a mark that ends a sentence, perhaps inside of a closing quote or bracket."""
    return word.rstrip("\"')]»”’」』）").endswith((".", "!", "?", "…", "。", "！", "？"))


def joined_words(texts: Iterable[str]) -> str:
    """Words as a text, with spaces where the script has them."""
    text = ""
    for part in texts:
        text += f" {part}" if text and part and not parts_words(text[-1], part[0]) else part
    return text


def token_groups(tokens: Sequence[TranscriptToken]) -> list[range]:
    """The tokens of each word, by their indices.

    A token of nothing but space, as many tokenizers have before digits, begins a word.
    """
    groups: list[range] = []
    begin, ended, last = 0, True, " "
    for index, token in enumerate(tokens):
        if not token.text.strip():
            if token.text and not ended:
                begin, ended = index, True
            continue
        if ended or token.text[0].isspace() or parts_words(last, token.text[0]):
            groups.append(range(begin if ended else index, index + 1))
        else:
            groups[-1] = range(groups[-1].start, index + 1)
        last = token.text[-1]
        begin, ended = index + 1, last.isspace()
    return groups


def match_tokens(text: str, tokens: Sequence[TranscriptToken]) -> tuple[list[str], list[range]]:
    """The words of a text, and the tokens of each; ranges are empty where tokens do not add up to the text."""
    whole = split_words(text)
    groups = token_groups(tokens)
    pieces = ["".join(token.text for token in tokens[group.start : group.stop]).strip() for group in groups]
    if all(len(piece.split()) == 1 for piece in pieces) and [w for p in pieces for w in split_words(p)] == whole:
        return pieces, groups
    return whole, [range(0)] * len(whole)


def words_of_tokens(tokens: Iterable[TranscriptToken]) -> tuple[Word, ...]:
    """Joins tokens to words.

    A word is as sure as the least sure of its tokens: one wrong token makes it another word.

    Args:
        tokens: Pieces that begin with the space before them.

    Returns:
        Words with times that never go back, or nothing where a token has none.
    """
    words: list[Word] = []
    joined = False
    for token in tokens:
        if token.start is None or token.end is None:
            return ()
        for index, part in enumerate(token.text.split()):
            glued = joined and index == 0 and not token.text[0].isspace()
            if words and glued and not parts_words(words[-1].text[-1], part[0]):
                last = words[-1]
                end, confidence = max(last.end, token.end), min(last.confidence, token.confidence)
                words[-1] = Word(last.text + part, last.start, end, confidence)
            else:
                start = max(token.start, words[-1].end) if words else token.start
                words.append(Word(part, start, max(start, token.end), token.confidence))
        joined = not token.text[-1:].isspace()
    return tuple(words)
