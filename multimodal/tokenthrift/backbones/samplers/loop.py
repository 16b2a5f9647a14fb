"""The decoding loop of masked-diffusion language models: it asks a sampler what to run next and hands it the logits.

Source: the shape of diffusers' schedulers, where the loop never changes and the sampler is one object. A sampler is a
frozen dataclass of options; `begin` makes a `Run`, which holds the state of one call of `sample`, so one sampler object
serves many threads. The loop itself knows nothing of confidence, blocks or lengths.

Differs from the published loops, which are one function a paper: a hook records every call of the model, `max_rounds`
ends any sampler by committing what is still open, and every run ends by construction (each sampler's file says why).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "CachedPredict",
    "Call",
    "Canvas",
    "Compat",
    "Generators",
    "Hook",
    "Predict",
    "Run",
    "Sampled",
    "Sampler",
    "TokenIds",
    "Trace",
    "sample",
]

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids (R, W), mask (R, W), rows (R,)) -> logits (R, W, vocab); `rows` index the batch given to `sample`."""

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, as published, or one for each row: then a row draws what it draws alone."""

Compat = Literal["corrected", "released"]
"""Which defaults the options of a sampler have; "released" reproduces the published code call by call."""


class CachedPredict(Protocol):
    """A forward pass that keeps keys and values, for the samplers that have a `cache`."""

    def __call__(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """As `Predict`; keeps nothing."""
        ...

    def refresh(self, ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """As `Predict`, over the whole canvas; keeps the keys and values of every slot."""
        ...

    def within(self, ids: Tensor, rows: Tensor, start: int) -> Tensor:
        """Scores a part of the canvas beside the keys and values kept of the rest.

        Args:
            ids: (R, W) the slots from `start` on.
            rows: (R,) the rows of the last `refresh`.
            start: first slot of the part.

        Returns:
            (R, W, vocab) logits of those slots.
        """
        ...


@dataclass(frozen=True, slots=True)
class TokenIds:
    """The special ids of a vocabulary.

    Attributes:
        mask: stands in a slot that is undecided.
        eos: ends the text, and fills what a row does not have.
        eot: ends a turn, for the options that treat it like `eos`.
        delete: leaves no text, where a model has such a token.
    """

    mask: int
    eos: int
    eot: int | None = None
    delete: int | None = None


@dataclass(frozen=True, slots=True)
class Canvas:
    """What a sampler starts from.

    Attributes:
        ids: (B, T) int64; MASK in the slots to decide. Not changed.
        mask: (B, T) bool, True where a slot exists. The prompt may be padded on the left, the response on the right.
        start: first slot of the response; the slots before it are the prompt.
    """

    ids: Tensor
    mask: Tensor
    start: int = 0

    @classmethod
    def after_prompt(cls, prompt: Tensor, length: int, mask_id: int, prompt_mask: Tensor | None = None) -> Canvas:
        """A response of `length` undecided slots after prompts (B, P) of one length, or padded on the left."""
        response = torch.full((len(prompt), length), mask_id, dtype=torch.int64, device=prompt.device)
        seen = torch.ones_like(prompt, dtype=torch.bool) if prompt_mask is None else prompt_mask.bool()
        mask = torch.cat([seen, torch.ones_like(response, dtype=torch.bool)], 1)
        return cls(torch.cat([prompt, response], 1), mask, prompt.shape[1])


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model.

    Attributes:
        ids: (R, W) what it reads.
        mask: (R, W) bool, the slots that exist.
        rows: (R,) rows of the batch. With guidance the second half repeats the first without what was given.
        window: first and last + 1 slot where only a part of the canvas is read beside cached keys and values.
        refresh: the call keeps the keys and values of every slot.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    window: tuple[int, int] | None = None
    refresh: bool = False


Hook = Callable[[Call, Tensor, Tensor], None]
"""Receives each call, its logits, and the ids (B, T) of the whole batch after the sampler used them."""


@dataclass(slots=True)
class Trace:
    """A hook that keeps everything: what the model read, what it said, and the batch after each call."""

    calls: list[Call] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)

    def __call__(self, call: Call, logits: Tensor, ids: Tensor) -> None:
        """See `Hook`."""
        self.calls.append(call)
        self.logits.append(logits)
        self.after.append(ids.clone())


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of `sample` for a batch.

    Attributes:
        ids: (B, T) int64; `tokens.eos` where a row has no slot after its prompt.
        mask: (B, T) bool, the slots that a row has at the end.
        confidence: (B, T) float64, the model's probability of each token when it was committed; NaN elsewhere.
        rounds: (B,) int64, calls in which a row took part.
        forwards: calls of the model.
        start: first slot of the response.
        tokens: the special ids.
    """

    ids: Tensor
    mask: Tensor
    confidence: Tensor
    rounds: Tensor
    forwards: int
    start: int
    tokens: TokenIds

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, slots of each response."""
        return self.mask[:, self.start :].sum(1)

    def responses(self) -> list[list[int]]:
        """The response of each row, special ids included."""
        rows = zip(self.ids[:, self.start :].tolist(), self.lengths.tolist(), strict=True)
        return [ids[:length] for ids, length in rows]

    def text_slots(self) -> list[list[int]]:
        """Per row, the slots of the response that make its text: before the first EOS, without deletions."""
        texts = []
        for ids in self.responses():
            end = ids.index(self.tokens.eos) if self.tokens.eos in ids else len(ids)
            texts.append([slot for slot in range(end) if ids[slot] != self.tokens.delete])
        return texts


class Run(ABC):
    """One decoding in progress; made by `Sampler.begin`.

    Attributes:
        ids, mask, confidence, rounds: as in `Sampled`, so far.
        ends: (B,) int64, first slot after each row.
        start: first slot of the response.
        tokens: the special ids.
        generators: where random numbers come from.
        calls: calls of the model so far.
    """

    def __init__(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> None:
        absent = ~canvas.mask
        absent[:, : canvas.start] = False  # padding of the prompt stays what the caller put there
        self.ids = canvas.ids.masked_fill(absent, tokens.eos)
        self.mask, self.start, self.tokens, self.generators = canvas.mask.clone(), canvas.start, tokens, generators
        self.ends = canvas.start + canvas.mask[:, canvas.start :].sum(1)
        self.confidence = torch.full(self.ids.shape, float("nan"), dtype=torch.float64, device=self.ids.device)
        self.rounds = torch.zeros(len(self.ids), dtype=torch.int64, device=self.ids.device)
        self.calls = 0

    @abstractmethod
    def request(self) -> Call | None:
        """What the model reads next; None where the run is over."""

    @abstractmethod
    def step(self, call: Call, logits: Tensor, last: bool) -> None:
        """Uses the logits of `call`; commits every open slot where `last` says that no further call comes."""

    def result(self) -> Sampled:
        """The outcome."""
        gone = ~self.mask
        gone[:, : self.start] = False
        ids = self.ids.masked_fill(gone, self.tokens.eos)
        return Sampled(ids, self.mask, self.confidence, self.rounds, self.calls, self.start, self.tokens)


class Sampler(ABC):
    """The options of a decoding algorithm; every subclass is a frozen dataclass."""

    @abstractmethod
    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> Run:
        """The run that decodes `canvas`.

        Raises:
            ValueError: the options do not fit the canvas.
        """


@torch.no_grad()
def sample(
    predict: Predict | CachedPredict,
    canvas: Canvas,
    sampler: Sampler,
    tokens: TokenIds,
    *,
    generators: Generators = None,
    max_rounds: int | None = None,
    trace: Hook | None = None,
) -> Sampled:
    """Decides every MASK of a batch.

    A row's result does not depend on its neighbors, as far as `predict` keeps rows apart and, where random numbers are
    drawn, `generators` holds one for each row.

    Args:
        predict: the forward pass.
        canvas: where to start; not changed.
        sampler: the algorithm.
        tokens: the special ids.
        generators: sources of random numbers for the samplers that draw any; fresh ones of seed 0 if not given, so that
            the global random state is neither read nor changed.
        max_rounds: most calls of the model; the last one commits every slot that is still open.
        trace: called after every call of the model, see `Trace`.

    Raises:
        ValueError: the options of the sampler do not fit the canvas, or `max_rounds` is below 1.
        TypeError: the sampler has a cache and `predict` keeps none.
    """
    if max_rounds is not None and max_rounds < 1:
        raise ValueError(f"max_rounds must be at least 1, not {max_rounds}")
    run = sampler.begin(canvas, tokens, generators or torch.Generator(canvas.ids.device).manual_seed(0))
    while (max_rounds is None or run.calls < max_rounds) and (call := run.request()) is not None:
        logits = _forward(predict, call)
        run.calls += 1
        run.step(call, logits, run.calls == max_rounds)
        if trace is not None:
            trace(call, logits, run.ids)
    return run.result()


def _forward(predict: Any, call: Call) -> Tensor:
    if not (call.refresh or call.window):
        logits: Tensor = predict(call.ids, call.mask, call.rows)
    elif not (hasattr(predict, "refresh") and hasattr(predict, "within")):
        raise TypeError("this sampler reuses keys and values: predict needs `refresh` and `within`, see CachedPredict")
    elif call.window is None:
        logits = predict.refresh(call.ids, call.mask, call.rows)
    else:
        logits = predict.within(call.ids, call.rows, call.window[0])
    return logits
