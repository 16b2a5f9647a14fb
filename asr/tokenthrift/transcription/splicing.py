"""What reading a part of a window again has found, put into its transcript: no word is lost, none is written twice.

Where reading began or stopped in a pause, the words before and behind it stay as they are, but for those that both
readings have there. Elsewhere the two are joined by `joining`, like windows that overlap.

Speech that was left out replaces what was written for it if it has more words and they are not mostly doubtful (a mean
confidence of 0.4). Words for a stretch that had none need 0.5, and are not taken if most of them are written right
beside it: the times of those were wrong then. A sentence in doubt is replaced unless the confidence of the new text is
lower by 0.1 or more, or it has far fewer or more words; a little less is accepted, as Whisper is no less sure of the
worse text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Final

from tokenthrift.spoken_words import SpokenWord, shifted, spoken_words
from tokenthrift.transcript import Transcript, TranscriptToken, Word
from tokenthrift.transcription.joining import division, plain
from tokenthrift.transcription.rereading import Part, timed_words
from tokenthrift.transcription.results import total_usage
from tokenthrift.words import joined_words, parts_words

__all__ = ["with_reread"]

_LEAST_CONFIDENCE: Final = 0.4
_LEAST_OF_NEW: Final = 0.5
_SURER: Final = 0.1
_FEWEST_WORDS: Final = 0.75
_MOST_WORDS: Final = 1.5
# Two readings give a word times that differ by about so many seconds.
_SAME_TIME: Final = 0.6
# So many words more than there are new ones are looked at on either side.
_NEAR: Final = 2


def with_reread(transcript: Transcript, part: Part, reread: Transcript) -> Transcript:
    """The transcript with what reading a part again has found, or as it was where that is no better.

    Args:
        transcript: of the window.
        part: of `rereading`, for this transcript.
        reread: of the part, times from its start.
    """
    same = replace(transcript, usage=total_usage((transcript.usage, reread.usage)))
    reread = shifted(reread, part.start)
    words = spoken_words(transcript, 0.0, part.end)
    again = timed_words(reread, part.end)
    before, behind = words[: part.first], words[part.last :]
    # A sentence may begin or end with the word beside it: only what is none of its own words is joined with others.
    lead, trail = (None, None) if part.confidence is None else _surplus(words[part.first : part.last], again)
    up_to, begin, stop, go_on = len(before), 0, len(again), 0
    if lead != 0 and part.start < part.bare[0]:
        up_to, begin = division(before, again[:lead], (part.start, part.bare[0]), 0)
    elif lead != 0:
        begin = _shared(before, again[:lead])
    if trail != 0:
        least = begin if trail is None else max(begin, len(again) - trail)
        if part.bare[1] < part.end:
            stop, go_on = division(again, behind, (part.bare[1], part.end), least)
        else:
            go_on = _shared(again[least:], behind)
    own = again[begin : stop - go_on]
    if part.first == part.last and part.bare[1] == part.end and before and own and _same_end(before[-1], own[-1]):
        up_to -= 1
    old, new = len(words) - len(behind[go_on:]) - up_to, again[begin:stop]
    if not _better(part, old, new):
        return same
    if part.first == part.last and _mostly_among(new, (*before[-len(new) - _NEAR :], *behind[: len(new) + _NEAR])):
        return same
    return _spliced(same, (before[:up_to], behind[go_on:]), reread, new)


def _better(part: Part, old: int, new: Sequence[SpokenWord]) -> bool:
    """Whether the words that were read again are better than the `old` words, a count, that they would replace."""
    confidence = sum(word.confidence for word in new) / max(len(new), 1)
    if part.confidence is None:
        least = _LEAST_OF_NEW if part.first == part.last else _LEAST_CONFIDENCE
        return len(new) > old and confidence >= least
    # Far more words are mostly a phrase that repeats, and the recognizer may be sure of it.
    as_many = _FEWEST_WORDS * old <= len(new) <= 1 + _MOST_WORDS * old
    return as_many and confidence > part.confidence - _SURER


def _surplus(own: Sequence[SpokenWord], again: Sequence[SpokenWord]) -> tuple[int | None, int | None]:
    """How many words of a sentence that was read again stand before its first own word, and behind its last one.

    None where that word was not read again.
    """
    old, new = [plain(word.text) for word in own], [plain(word.text) for word in again]
    *runs, _ = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    if not runs:
        return None, None
    first, last = runs[0], runs[-1]
    return (
        first.b if first.a == 0 else None,
        len(again) - last.b - last.size if last.a + last.size == len(own) else None,
    )


def _shared(before: Sequence[SpokenWord], after: Sequence[SpokenWord]) -> int:
    """How many of the last words of `before` are the first ones of `after`, at about the same time."""
    for count in range(min(len(before), len(after)), 0, -1):
        pairs = zip(before[-count:], after[:count], strict=True)
        if all(plain(a.text) == plain(b.text) and abs(a.start - b.start) <= _SAME_TIME for a, b in pairs):
            return count
    return 0


def _same_end(before: SpokenWord, last: SpokenWord) -> bool:
    """Whether the word before speech without words lasted until its end because it is the last one there."""
    return plain(before.text) == plain(last.text) and abs(before.end - last.end) <= _SAME_TIME


def _mostly_among(words: Sequence[SpokenWord], near: Sequence[SpokenWord]) -> bool:
    """Whether more than half of the words are among others, in their order."""
    texts, others = [plain(word.text) for word in words], [plain(word.text) for word in near]
    blocks = SequenceMatcher(None, texts, others, autojunk=False).get_matching_blocks()
    return 2 * sum(block.size for block in blocks) > len(texts)


def _spliced(
    transcript: Transcript,
    kept: tuple[Sequence[SpokenWord], Sequence[SpokenWord]],
    reread: Transcript,
    middle: Sequence[SpokenWord],
) -> Transcript:
    """The transcript with words of the reread one between those of its own that are kept before and behind."""
    before, behind = kept
    tokens: list[TranscriptToken] = []
    for source, words in ((transcript, before), (reread, middle), (transcript, behind)):
        for word in words:
            first, *others = source.tokens[word.tokens.start : word.tokens.stop]
            # The first token of a text may have no space before it.
            touches = bool(tokens) and not first.text[:1].isspace() and not tokens[-1].text[-1:].isspace()
            apart = touches and not parts_words(tokens[-1].text[-1:] or " ", word.text[0])
            spaced = f" {first.text}" if apart else first.text
            tokens += [replace(first, text=spaced), *others]
    spoken = (*before, *middle, *behind)
    timed = tuple(Word(word.text, word.start, word.end, word.confidence) for word in spoken)
    return replace(
        transcript,
        text=joined_words(word.text for word in spoken),
        tokens=tuple(tokens),
        words=timed if transcript.words else (),
        alternatives=(),
    )
