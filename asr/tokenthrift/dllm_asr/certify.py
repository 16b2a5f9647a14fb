"""Certified decoding: exactly the greedy left-to-right text of the language model, in few passes of it.

Source: greedy verification of drafts, as in DiffuSpec (arXiv 2510.02358), where a diffusion model drafts, and in
self-speculative decoding for speech (arXiv 2603.11243), where a CTC head on the same encoder does. One pass of the
causal reading says the greedy token after each token of a draft; the longest run that agrees is accepted, the first
disagreement takes the causal token, and the rest of the draft is verified on.

Differs from both: the draft is not thrown away at the first disagreement. The text so far is aligned to it letter by
letter (Levenshtein distance), because a misspelled word is cut into other tokens than the right one. What stands after
the aligned letter, which may be the rest of a word, is cut into tokens and verified next, and where the pass disagreed
further on, its own tokens replace those of the draft (a step of Jacobi decoding), so several errors of a draft cost one
pass together. Several drafts are read side by side. SpecDec++'s adaptive length (arXiv 2405.19715) is an option: there
a trained head says how likely a token is accepted; here the last pass over it does, and before one the draft's own
confidence. Recordings of a batch are read side by side too: one that is done leaves, and the next one enters.

Why the text is the greedy one, whatever the draft: a token is only ever written if it is the greedy one after those
before it. Why it ends: every pass writes at least one token, up to the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenthrift.dllm_asr.edit_distance import next_distances
from tokenthrift.dllm_asr.reading import CausalReader, ReadTogether

__all__ = [
    "Certification",
    "Certified",
    "CertifyOptions",
    "Draft",
    "Spelling",
    "certify_together",
    "check_beams",
]


UNLIKELY = 0.3
"""How often a token is accepted that the last pass rejected after a wrong one."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be verified.

    Attributes:
        words: as they are written.
        confidence: of each word; as many, or none, which is 1.
    """

    words: Sequence[str]
    confidence: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens and letters belong together.

    Attributes:
        piece: what a token writes, with a leading space where it begins a word.
        tokens: how a word after a space, or a rest of a word, is cut; any integers.
    """

    piece: Callable[[int], str]
    tokens: Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """How drafts are verified; the text is the same with all of them.

    Attributes:
        correct: replace tokens of the draft where a pass disagrees after the first disagreement.
        max_rejection_prob: a pass reads a draft up to where one of its tokens is rejected with this probability, as
            the last pass over them says, or, where there was none, the confidences of the draft; 1 reads it to the end.
    """

    correct: bool = True
    max_rejection_prob: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.max_rejection_prob <= 1:
            raise ValueError(f"max_rejection_prob must lie in (0, 1], not {self.max_rejection_prob}")


@dataclass(frozen=True, slots=True)
class Certified:
    """The greedy text and what it took.

    Attributes:
        ids: tokens without the end.
        probabilities: of each token under the causal reading.
        passes: of the causal reading, one after another.
        accepted: tokens that a draft had in the right position, the end included.
        written: all tokens, the end included where there is one.
    """

    ids: list[int]
    probabilities: list[float]
    passes: int
    accepted: int
    written: int


def check_beams(beams: int) -> None:
    """Raises a ValueError for a beam search, whose text is not the greedy one."""
    if beams != 1:
        raise ValueError(f"certified decoding writes the greedy text, so it has no beams, not {beams}: take beams=1")


class Certification:
    """The verification of the drafts of one recording, pass by pass.

    Args:
        reader: of the recording; nothing has been read yet.
        drafts: none, one, or several that are read side by side.
        spelling: of the tokens.
        limit: most tokens to write, the end included.
        end: token that ends the text.
        forbidden: tokens that are never written.
        options: how to verify.
    """

    def __init__(
        self,
        reader: CausalReader,
        drafts: Sequence[Draft],
        spelling: Spelling,
        *,
        limit: int,
        end: int,
        forbidden: Collection[int] = (),
        options: CertifyOptions | None = None,
    ) -> None:
        options = options or CertifyOptions()
        self.reader, self.end, self.limit = reader, end, min(limit, reader.positions)
        self._banned = sorted(forbidden)
        possible = _Possible(reader.vocab_size, frozenset(forbidden))
        self._followers = [_Follower(draft, spelling, end, possible, options) for draft in drafts or [Draft(())]]
        self._text: list[int] = []
        self._chances: list[float] = []
        self._unread, self._passes, self._accepted = list(reader.begin), 0, 0
        self._proposals: list[list[int]] = []
        self._distinct: list[tuple[int, ...]] = []

    @property
    def done(self) -> bool:
        """Whether the text has its end, or is as long as it may be."""
        return len(self._text) >= self.limit or self._text[-1:] == [self.end]

    def continuations(self) -> list[list[int]]:
        """What the reader reads in the next pass, which `take` concludes."""
        most = self.limit - len(self._text) - 1
        self._proposals = [follower.propose(most) for follower in self._followers]
        self._distinct = list(dict.fromkeys(map(tuple, self._proposals)))
        return [[*self._unread, *proposal] for proposal in self._distinct]

    def take(self, scores: Sequence[Tensor]) -> None:
        """Writes what a pass over the continuations allows.

        Args:
            scores: `(n, vocab)` of what follows each token, for each continuation; forbidden tokens are set to -inf.
        """
        self._passes += 1
        said = []
        for row in scores:
            own = row[len(self._unread) - 1 :]
            if self._banned:
                own[:, self._banned] = float("-inf")
            said.append((own, own.argmax(-1).tolist()))
        for follower, proposal in zip(self._followers, self._proposals, strict=True):
            own, tokens = said[self._distinct.index(tuple(proposal))]
            follower.corrected(proposal, tokens, own)
        runs = [_agreed(proposal, tokens) for proposal, (_, tokens) in zip(self._distinct, said, strict=True)]
        best = max(range(len(runs)), key=lambda i: runs[i])
        (own, tokens), run = said[best], runs[best]
        self._accepted += run
        # The pass also says what follows the run, unless that is the end.
        count = run if self._distinct[best][:run][-1:] == (self.end,) else run + 1
        self._text += tokens[:count]
        self._chances += _chances(own[:count])
        for follower in self._followers:
            follower.follow(tokens[:count])
        self.reader.keep(best, len(self._unread) + run)
        self._unread = self._text[-1:]

    def result(self) -> Certified:
        """The greedy text, once `done`."""
        text, written = self._text, len(self._text)
        if text[-1:] == [self.end]:
            text = text[:-1]
        return Certified(text, self._chances[: len(text)], self._passes, self._accepted, written)


@torch.no_grad()
def certify_together(runs: Sequence[Certification], read: ReadTogether, rows: int) -> list[Certified]:
    """Certifies recordings side by side; the text of each is that of the recording alone.

    Args:
        runs: one for each recording.
        read: a pass over the continuations of several readers, see `BatchReader`.
        rows: most recordings in a pass; one that is done leaves, and the next one enters.
    """
    waiting, active = [run for run in runs if not run.done][::-1], list[Certification]()
    while waiting or active:
        while waiting and len(active) < rows:
            active.append(waiting.pop())
        said = read([run.reader for run in active], [run.continuations() for run in active])
        for run, scores in zip(active, said, strict=True):
            run.take(scores)
        active = [run for run in active if not run.done]
    return [run.result() for run in runs]


def _chances(scores: Tensor) -> list[float]:
    """The probability of the most probable token of each row."""
    found: list[float] = (scores.amax(-1) - scores.logsumexp(-1)).exp().tolist()
    return found


def _agreed(proposal: Sequence[int], tokens: Sequence[int]) -> int:
    return next((at for at, token in enumerate(proposal) if token != tokens[at]), len(proposal))


@dataclass(frozen=True, slots=True)
class _Possible:
    """The tokens that may be written."""

    size: int
    forbidden: frozenset[int]

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and 0 <= token < self.size and token not in self.forbidden


@dataclass(slots=True)
class _Follower:
    """Proposes what is left of a draft after the text so far.

    Attributes:
        possible: tokens that may be written.
        letters: the draft, a space before each word.
        codes: of the letters.
        distances: edit distance between the text so far and each beginning of the letters.
        corrections: tokens that a pass would rather have, by the letter where the token of the draft begins.
        chances: how likely that token is accepted, or its correction, as the last pass over it says.
        proposed: of each token of the last proposal, where it begins and the draft's own token.
    """

    draft: Draft
    spelling: Spelling
    end: int
    possible: Container[int]
    options: CertifyOptions
    letters: str = field(init=False)
    codes: NDArray[np.int64] = field(init=False)
    distances: NDArray[np.int64] = field(init=False)
    corrections: dict[int, int] = field(default_factory=dict)
    chances: dict[int, float] = field(default_factory=dict)
    proposed: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.letters = "".join(f" {word}" for word in self.draft.words)
        self.codes = np.array([ord(letter) for letter in self.letters], dtype=np.int64)
        self.distances = np.arange(len(self.letters) + 1)

    def propose(self, most: int) -> list[int]:
        """At most so many tokens; the end comes last and only there."""
        out: list[int] = []
        self.proposed, all_accepted = [], 1.0
        start, stop = self._aligned(), 0
        for index, word in enumerate(self.draft.words):
            first, stop = stop, stop + 1 + len(word)
            position = max(first, start)
            for token in self.spelling.tokens(self.letters[position:stop]) if position < stop else ():
                now = self.corrections.get(position, token)
                if now in self.possible:
                    sure = self.draft.confidence[index] if self.draft.confidence else 1.0
                    all_accepted *= self.chances.get(position, sure)
                    if 1 - all_accepted > self.options.max_rejection_prob:
                        return out[:most]  # too unsure to be worth reading
                    out.append(now)
                    self.proposed.append((position, token))
                    if now == self.end:
                        return out[:most]
                if position in self.corrections:
                    break  # the rest of a word whose beginning was replaced
                position += len(self.spelling.piece(token))
        out.append(self.end)
        return out[:most]

    def corrected(self, proposal: Sequence[int], tokens: Sequence[int], scores: Tensor) -> None:
        """Notes what a pass over the last proposal says after the first disagreement, whose token is written.

        Args:
            proposal: the last one.
            tokens: the greedy token after each of its tokens.
            scores: `(n, vocab)` that it was chosen by.
        """
        if not self.options.correct:
            return
        # Probabilities cost as much as the choice itself, and only an adaptive length needs them.
        chances = _chances(scores) if self.options.max_rejection_prob < 1 else [1.0] * len(tokens)
        for at in range(_agreed(proposal, tokens) + 1, min(len(self.proposed), len(proposal))):
            position, own = self.proposed[at]
            self.corrections.pop(position, None)
            self.chances[position] = chances[at] if tokens[at] == own else UNLIKELY
            # What follows a token that is wrong itself was said in its light.
            if tokens[at] != own and tokens[at - 1] == proposal[at - 1]:
                self.corrections[position], self.chances[position] = tokens[at], chances[at]

    def follow(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            for letter in self.spelling.piece(token):
                self.distances = next_distances(self.distances, self.codes, ord(letter), ord(" "))

    def _aligned(self) -> int:
        """The beginning of the letters that is most like the text, the longest among equals."""
        return int(np.flatnonzero(self.distances == self.distances.min())[-1])
