"""What the contract suite runs over: every reducer and every system, a line each in `SUBJECTS`.

A subject says how to build it (tiny, with random weights), what items it takes, how large they are and how it is run.
`test_laws` runs every law of the budget interface over all of them. A law that a subject cannot keep stands in
`EXCEPTIONS` with the reason, and a test proves that it is indeed not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.asr.tiny_dllm import speech
from tests.asr.tiny_dllm import tiny_model as tiny_dllm
from tests.asr.tiny_mtsk import lips
from tests.asr.tiny_mtsk import speech as swell
from tests.asr.tiny_mtsk import tiny_model as tiny_mtsk
from tests.tokenizers.karl.tiny_karl import pictures, tiny_karl
from tests.tokenizers.vqtoken.tiny_answerer import tiny_answerer
from tokenthrift.budget import ItemSize, TokenUsage
from tokenthrift.padding import pad_rows
from tokenthrift.reducers import (
    AveragePooling,
    BipartiteMerging,
    ConditionalDiversity,
    MaxMinDiversity,
    NormPruning,
    Prefix,
    QuerySelection,
    RandomSubset,
    Stacking,
    TemporalMerging,
    Uniform,
)
from tokenthrift.tokens import TokenBatch
from tokenthrift.transcript import Transcript
from tokenthrift.vqtoken import VQToken

WIDTH = 6
"""Of the embeddings that reducers are given."""


class Row(NamedTuple):
    """What a subject made of one item: its usage, what must be equal exactly, and what up to 1e-5."""

    usage: TokenUsage
    exact: tuple[Any, ...]
    floats: Tensor


@dataclass(frozen=True)
class Subject:
    """A reducer or a system under the laws.

    Attributes:
        name: in the names of tests.
        build: a tiny one with random weights, made once.
        items: items of unequal size from a seed, the longest not first.
        size: what is known of an item before anything runs.
        run: the system's own verb over a batch of items under a budget, or a list of budgets.
        budgets: as text, from strict to loose: ones that it honors, of its own fields.
        reducer: whether a budget at or above native has to return the input bit for bit.
        examples: how many random cases a law tries.
    """

    name: str
    build: Callable[[], Any]
    items: Callable[[int], list[Any]]
    size: Callable[[Any], ItemSize]
    run: Callable[[Any, Sequence[Any], Any], list[Row]]
    budgets: Sequence[str]
    reducer: bool = False
    examples: int = 15
    built: Callable[[], Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "built", cache(self.build))

    def plan(self, items: Sequence[Any], budget: Any) -> tuple[TokenUsage, ...]:
        """The plan of some items."""
        planned: tuple[TokenUsage, ...] = self.built().plan([self.size(item) for item in items], budget)
        return planned


def rows_of(tokens: TokenBatch) -> list[Row]:
    """The rows of a batch of tokens."""
    found = []
    for i, real in enumerate(tokens.mask):
        # A token that stands for itself has size 1, whether or not its batch has sizes.
        columns = (tokens.positions, tokens.codes, tokens.mask.float() if tokens.sizes is None else tokens.sizes)
        exact = tuple(None if values is None else values[i][real].tolist() for values in columns)
        found.append(Row(tokens.usage[i], exact, tokens.embeddings[i][real]))
    return found


def embedding_items(seed: int) -> list[Tensor]:
    """Native tokens of four items, (N_i, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (3,), generator=generator).tolist()
    return [torch.randn(n, WIDTH, generator=generator) for n in (lengths[0], 31, *lengths[1:])]


def batch_of(items: Sequence[Tensor], *, left: bool = False, fill: float = 0.0, extra: int = 0) -> TokenBatch:
    """Items as a batch, padded on a side with a value, by `extra` positions more than needed."""
    wide = [*items, torch.zeros(max(map(len, items)) + extra, items[0].shape[1])]
    embeddings, mask = (values[: len(items)] for values in pad_rows(wide, "left" if left else "right", fill))
    return TokenBatch.from_embeddings(embeddings, mask, seconds_of(items), [(len(item), 1, 1) for item in items])


def seconds_of(items: Sequence[Tensor]) -> list[float]:
    """Ten tokens a second."""
    return [len(item) / 10 for item in items]


def size_of(item: Tensor) -> ItemSize:
    """Of an item of embeddings."""
    return ItemSize(native=len(item), seconds=len(item) / 10, frames=len(item), height=1, width=1)


def reduce(reducer: Any, items: Sequence[Tensor], budget: Any) -> list[Row]:
    """A reducer over items."""
    return rows_of(reducer.reduce(batch_of(items), budget))


def reducer(
    name: str, build: Callable[[], Any], budgets: Sequence[str] = ("3", "25%", "4/s", "9,50%", "100%")
) -> Subject:
    """The subject of a reducer of embeddings."""
    return Subject(name, build, embedding_items, size_of, reduce, budgets, reducer=True, examples=30)


def image_size(item: Tensor) -> ItemSize:
    """Of a picture (3, H, W)."""
    return ItemSize(height=item.shape[1], width=item.shape[2])


def clips(seed: int) -> list[Tensor]:
    """Three clips (4, 3, 16, 16) of growing contrast."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, 4, 3, 16, 16), generator=generator)
    return list((noise * torch.tensor([0.3, 1.0, 0.6])[:, None, None, None, None]).to(torch.uint8))


def recordings(seed: int) -> list[Tensor]:
    """Three recordings (samples,) at 16 kHz."""
    return [speech(seconds, seed=seed + i) for i, seconds in enumerate((0.7, 2.1, 1.3))]


def talks(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three talking videos: sound (samples,) at 16 kHz and mouth crops (T, 36, 36)."""
    return [(swell(seconds, seed + i), lips(seconds, seed + i)) for i, seconds in enumerate((0.4, 1.1, 0.7))]


def transcripts(found: Sequence[Transcript]) -> list[Row]:
    """Their rows: text and pieces exactly, confidences up to rounding."""
    return [
        Row(t.usage, (t.text, [piece.text for piece in t.tokens]), torch.tensor([p.confidence for p in t.tokens]))
        for t in found
    ]


SUBJECTS: list[Subject] = [
    reducer("Uniform", Uniform),
    reducer("RandomSubset", lambda: RandomSubset(seed=3)),
    reducer("Prefix", Prefix),
    reducer("NormPruning", NormPruning),
    reducer("AveragePooling", AveragePooling),
    reducer("Stacking", lambda: Stacking(rate=40)),
    reducer("BipartiteMerging", BipartiteMerging),
    reducer("MaxMinDiversity", MaxMinDiversity),
    reducer("ConditionalDiversity", ConditionalDiversity),
    reducer("QuerySelection", QuerySelection),
    reducer("TemporalMerging", TemporalMerging),
    reducer("VQToken", VQToken, ("3", "25%", "4/s", "e0.3", "9,e0.1", "9,50%", "100%")),
    Subject(
        "VideoAnswerer",
        tiny_answerer,
        clips,
        lambda item: ItemSize(frames=len(item), height=item.shape[2], width=item.shape[3]),
        lambda model, items, budget: rows_of(model.vqtoken.reduce(model.encode(torch.stack(list(items))), budget)),
        ("3", "25%", "e0.3", "9,e0.1", "9", "100%"),
        examples=8,
    ),
    Subject(
        "Karl",
        lambda: tiny_karl(decisive=True),
        lambda seed: list(pictures(4, seed=seed)),
        image_size,
        lambda model, items, budget: rows_of(model.encode(torch.stack(list(items)), budget)),
        ("3", "25%", "e0.2", "9,e0.1", "9", "100%"),
        examples=8,
    ),
    Subject(
        "DllmAsr",
        lambda: tiny_dllm(pools=(1, 2, 4, 8)).double(),
        recordings,
        lambda item: ItemSize(seconds=len(item) / 16_000),
        lambda model, items, budget: transcripts(model.transcribe(items, budget)),
        ("13", "20", "25%", "12.5/s", "40,50%", "25/s", "100%"),
        examples=5,
    ),
    Subject(
        "DllmAsr, one rate",
        tiny_dllm,
        recordings,
        lambda item: ItemSize(seconds=len(item) / 16_000),
        lambda model, items, budget: transcripts(model.transcribe(items, budget)),
        ("{}", '{"min_tokens": 2}', '{"min_tokens": 1}'),
        examples=5,
    ),
    Subject(
        "LlamaMtsk",
        # In double precision, as random weights can turn the last digit of a float into another text.
        lambda: tiny_mtsk(tasks=("avsr", "asr", "vsr")).double(),
        talks,
        lambda item: ItemSize(seconds=len(item[0]) / 16_000, frames=len(item[1])),
        lambda model, items, budget: transcripts(model.transcribe(*zip(*items, strict=True), budget)),
        ("8", "9", "25%", "25/s", "40,50%", "100%"),
        examples=5,
    ),
]

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("Stacking", "whole"): "its width is always rate * D, so the input comes back in the first D channels",
    ("Stacking", "attach"): "a language model reads one width, so attach refuses a reducer that changes it",
}
"""(subject, law): why it cannot keep that law."""
