"""Words of a transcript from its tokens: a word is what stands between spaces."""

from __future__ import annotations

from collections.abc import Iterable

from tokenthrift.transcript import TranscriptToken, Word

__all__ = ["words_of_tokens"]


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
            if words and joined and index == 0 and not token.text[0].isspace():
                last = words[-1]
                end, confidence = max(last.end, token.end), min(last.confidence, token.confidence)
                words[-1] = Word(last.text + part, last.start, end, confidence)
            else:
                start = max(token.start, words[-1].end) if words else token.start
                words.append(Word(part, start, max(start, token.end), token.confidence))
        joined = not token.text[-1:].isspace()
    return tuple(words)
