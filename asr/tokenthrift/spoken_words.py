"""The words of a transcript with their times, and the transcript with fewer of them, or later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.words import joined_words, match_tokens

__all__ = ["SpokenWord", "shifted", "spoken_words", "written"]


@dataclass(frozen=True, slots=True)
class SpokenWord:
    """A word of a transcript with the tokens that write it.

    Attributes:
        text: as written.
        start: seconds from the start of the recording.
        end: likewise.
        confidence: the least of its tokens; the mean of all where it is not known which are its own.
        tokens: from which to which of the transcript's tokens; an empty range where they do not add up to the text.
        timed: whether the recognizer gave the times.
    """

    text: str
    start: float
    end: float
    confidence: float
    tokens: range
    timed: bool


def spoken_words(transcript: Transcript, start: float, end: float) -> list[SpokenWord]:
    """The words of a window's transcript on the clock of the recording.

    Args:
        transcript: what was written for the window.
        start: start of the window in seconds.
        end: end of the window in seconds.
    """
    texts, groups = match_tokens(transcript.text, transcript.tokens)
    sure = [token.confidence for token in transcript.tokens]
    unknown = sum(sure) / len(sure) if sure else 1.0
    letters = [len(text) + 1 for text in texts]
    share = (end - start) / max(sum(letters), 1)
    words = []
    for index, (text, group) in enumerate(zip(texts, groups, strict=True)):
        own = transcript.tokens[group.start : group.stop]
        begins, ends = own[0].start if own else None, own[-1].end if own else None
        confidence = min((token.confidence for token in own), default=unknown)
        if len(transcript.words) == len(texts):
            word = transcript.words[index]
            begins, ends, confidence = word.start, word.end, word.confidence
        timed = begins is not None and ends is not None
        if begins is None or ends is None:
            begins, ends = share * sum(letters[:index]), share * sum(letters[: index + 1])
        words.append(SpokenWord(text, start + begins, start + ends, confidence, group, timed))
    return words


def written(transcript: Transcript, words: Sequence[SpokenWord], kept: Sequence[int]) -> Transcript:
    """The transcript with only those of its words.

    Args:
        transcript: what was written.
        words: all of it, from `spoken_words`.
        kept: ascending indices into `words`.
    """
    if len(kept) == len(words):
        return transcript
    tokens: list[TranscriptToken] = []
    for index in kept:
        tokens += [transcript.tokens[i] for i in words[index].tokens]
    has_words = len(transcript.words) == len(words)
    return replace(
        transcript,
        text=joined_words(words[index].text for index in kept),
        tokens=tuple(tokens),
        words=tuple(transcript.words[index] for index in kept) if has_words else (),
        alternatives=(),
    )


def shifted(transcript: Transcript, seconds: float) -> Transcript:
    """The transcript with all its times so much later, or earlier by a negative number, but none before 0."""
    if not seconds:
        return transcript
    tokens = tuple(
        token
        if token.start is None or token.end is None
        else replace(token, start=max(token.start + seconds, 0.0), end=max(token.end + seconds, 0.0))
        for token in transcript.tokens
    )
    words = tuple(
        replace(word, start=max(word.start + seconds, 0.0), end=max(word.end + seconds, 0.0))
        for word in transcript.words
    )
    return replace(transcript, tokens=tokens, words=words)
