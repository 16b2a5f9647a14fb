"""From recordings to transcripts: the price of each, batches of like items, one encoder pass, then the language model.

Source: Llama-MTSK (arXiv 2503.06362), section 3, inference. Differs from the published code, which transcribes one item
at a time at rates fixed for the whole run: each item has the rates its budget affords, and its transcript is that of
the item alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, BudgetLike, DecodeBudget, TokenBudget, TokenUsage
from tokenthrift.mtsk.coarse_to_fine import ladder_prices, refine
from tokenthrift.mtsk.decoding import Heard, Written
from tokenthrift.mtsk.noise import estimate_snr
from tokenthrift.mtsk.rates import Price, Rates, choose, price
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.whisper import MAX_STATES, SAMPLE_RATE, states_of

if TYPE_CHECKING:
    from tokenthrift.mtsk.config import MTSKConfig
    from tokenthrift.mtsk.model import LlamaMTSK

__all__ = ["Item", "ceilings_of", "items_of", "plan_item", "transcribe_items"]

STATES_PER_SECOND = 50
FRAMES_PER_SECOND = 25
BATCH_SECONDS = 120.0
SPARE_TOKENS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One recording: sound, lips or both."""

    audio: Tensor | None
    video: Tensor | None

    @property
    def states(self) -> int:
        """Encoder states of its sound."""
        return 0 if self.audio is None else states_of(len(self.audio))

    @property
    def frames(self) -> int:
        """Encoder states of its lips."""
        return 0 if self.video is None else len(self.video)

    @property
    def seconds(self) -> float:
        """Duration of the longer stream."""
        return max(self.states / STATES_PER_SECOND, self.frames / FRAMES_PER_SECOND)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """An item and what was decided for it."""

    item: Item
    first: Rates
    price: Price
    first_price: int


def items_of(audio: Sequence[Tensor | None] | None, video: Sequence[Tensor | None] | None) -> list[Item]:
    """Pairs streams up and checks them.

    Raises:
        ValueError: the message names the first item that no encoder can read.
    """
    count = len(audio if audio is not None else video if video is not None else ())
    sounds = [None] * count if audio is None else list(audio)
    pictures = [None] * count if video is None else list(video)
    if len(sounds) != len(pictures):
        raise ValueError(f"{len(sounds)} items of audio but {len(pictures)} of video")
    for i, (samples, frames) in enumerate(zip(sounds, pictures, strict=True)):
        if samples is None and frames is None:
            raise ValueError(f"item {i} has neither audio nor video")
        if samples is not None:
            if samples.ndim != 1:
                raise ValueError(f"audio {i} must be one channel of shape (samples,), got {tuple(samples.shape)}")
            if states_of(len(samples)) > MAX_STATES:
                seconds = len(samples) / SAMPLE_RATE
                raise ValueError(f"audio {i} has {seconds:.2f} s, at most 30 s fit one pass; cut it into windows")
            if not bool(torch.isfinite(samples).all()):
                raise ValueError(f"audio {i} holds NaN or infinite samples")
        if frames is not None:
            if frames.ndim != 3 or not len(frames):
                raise ValueError(f"video {i} must be (frames, H, W) with a frame or more, got {tuple(frames.shape)}")
            if len(frames) > MAX_STATES // 2:
                seconds = len(frames) / FRAMES_PER_SECOND
                raise ValueError(f"video {i} has {seconds:.2f} s, at most 30 s fit one pass; cut it into windows")
            if frames.is_floating_point() and not bool(torch.isfinite(frames).all()):
                raise ValueError(f"video {i} holds NaN or infinite values")
    return [Item(samples, frames) for samples, frames in zip(sounds, pictures, strict=True)]


def ceilings_of(budget: BudgetLike | Rates | None) -> TokenBudget | Rates:
    """What a caller may say, as what the choice of rates is made by; None for no ceiling.

    Raises:
        ValueError: a short form that says nothing.
    """
    if isinstance(budget, Rates):
        return budget
    return TokenBudget() if budget is None else TokenBudget.parse(budget)


def plan_item(
    config: MTSKConfig,
    states: int,
    frames: int,
    budget: TokenBudget | Rates,
    *,
    snr: float | None = None,
    coarse_to_fine: bool = False,
) -> tuple[Rates, Price, int]:
    """The rates of an item, without weights: the first it is decoded at, the price of the last, the price of the first.

    Args:
        config: of the model.
        states: encoder states of its audio, 0 without.
        frames: of its video, 0 without.
        budget: ceilings, or the rates themselves.
        snr: noise of its audio in dB, None for clean.
        coarse_to_fine: the price is that of both passes.

    Raises:
        BudgetError: nothing fits the ceilings.
        ValueError: the model has no rates for the streams that there are.
    """
    offered = [r for r in config.scales if (states or not r.audio) and (frames or not r.video)]
    if isinstance(budget, Rates):
        offered = [rates for rates in offered if rates == budget]
    if not offered:
        streams = " and ".join(name for name, n in (("audio", states), ("video", frames)) if n)
        wanted = f"rates {budget}" if isinstance(budget, Rates) else "any rates"
        known = ", ".join(map(str, config.scales))
        raise ValueError(f"an item with {streams} cannot have {wanted}; the model has (audio, video) {known}")
    ceilings = TokenBudget() if isinstance(budget, Rates) else budget
    prices = {rates: price(rates, states, frames, whole_windows=config.released) for rates in offered}
    seconds = max(states / STATES_PER_SECOND, frames / FRAMES_PER_SECOND)
    if not coarse_to_fine:
        chosen = choose(prices, config.table, states + frames, seconds, ceilings, snr)
        return chosen.rates, chosen, chosen.usage.used
    shared = {r.audio: price(Rates(audio=r.audio), states, 0, whole_windows=config.released) for r in prices if r.audio}
    first, both = ladder_prices(prices, shared if _shares(config) else {})
    chosen = choose(both, config.table, states + frames, seconds, ceilings, snr)
    return first, chosen, prices[first]


def transcribe_items(
    model: LlamaMTSK,
    items: Sequence[Item],
    budget: TokenBudget | Rates,
    decode: DecodeBudget | None,
    *,
    coarse_to_fine: bool,
    noise_aware: bool,
) -> list[Transcript]:
    """See `LlamaMTSK.transcribe`."""
    threshold: float = model.config.decode.confidence_threshold
    if decode is not None:
        if decode.confidence_threshold is not None:
            if not coarse_to_fine:
                asked = f"confidence_threshold={decode.confidence_threshold}"
                raise BudgetError(asked, "a threshold with coarse_to_fine", "no confidence_threshold")
            threshold = decode.confidence_threshold
        coarse_to_fine = coarse_to_fine and decode.max_rounds != 1
    tasks = []
    for item in items:
        snr = estimate_snr(item.audio) if noise_aware and item.audio is not None else None
        planned = plan_item(model.config, item.states, item.frames, budget, snr=snr, coarse_to_fine=coarse_to_fine)
        tasks.append(_Task(item, *planned))
    results: dict[int, Transcript] = {}
    for rows in _batches(tasks):
        results.update(zip(rows, _transcribe(model, [tasks[i] for i in rows], decode, threshold), strict=True))
    return [results[i] for i in range(len(items))]


def _batches(tasks: Sequence[_Task]) -> Iterator[list[int]]:
    """Rows that use the same streams and rates, of like length."""
    groups: dict[tuple[Rates, Rates], list[int]] = {}
    for row, task in enumerate(tasks):
        groups.setdefault((task.first, task.price.rates), []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: tasks[row].item.seconds, reverse=True)
        while rows:
            size = max(1, int(BATCH_SECONDS / tasks[rows[0]].item.seconds))
            yield rows[:size]
            rows = rows[size:]


def _transcribe(
    model: LlamaMTSK, tasks: Sequence[_Task], decode: DecodeBudget | None, threshold: float
) -> list[Transcript]:
    first, last = [task.first for task in tasks], [task.price.rates for task in tasks]
    used = {*first, *last}
    audio = [task.item.audio for task in tasks if task.item.audio is not None] if any(r.audio for r in used) else None
    video = [task.item.video for task in tasks if task.item.video is not None] if any(r.video for r in used) else None
    encoded = model.encode(audio, video)
    limits = [token_limit(model.config, task.item.seconds, decode) for task in tasks]
    heard: dict[int, Heard | None] = {}
    goes_on = _shares(model.config) and first[0] != last[0] and first[0].audio == last[0].audio

    def texts(rates: Rates, rows: list[int]) -> list[Written]:
        # The whole batch has the same first rates, so what it heard then is there for any of its rows.
        before = heard.get(rates.audio)
        if before is None and goes_on and rates.audio:
            before = heard[rates.audio] = model.listen(encoded.select(rows), rates)
        elif before is not None:
            before = before.select(rows)
        return model.write(encoded.select(rows), rates, [limits[row] for row in rows], heard=before)

    prices = [(task.first_price, task.price.usage.used) for task in tasks]
    transcripts = []
    for task, outcome in zip(tasks, refine(first, last, prices, texts, threshold), strict=True):
        usage = task.price.usage
        spent = TokenUsage(native=usage.native, cap=usage.cap, used=outcome.used, rounds=outcome.rounds)
        transcripts.append(transcript(model, outcome.written, spent))
    return transcripts


def token_limit(config: MTSKConfig, seconds: float, decode: DecodeBudget | None = None) -> int:
    """Most tokens to write for an item, its end included."""
    limit = min(config.decode.max_new_tokens, SPARE_TOKENS + math.ceil(seconds * config.decode.tokens_per_second))
    return limit if decode is None or decode.max_new_tokens is None else min(limit, decode.max_new_tokens)


def transcript(model: LlamaMTSK, written: Written, usage: TokenUsage) -> Transcript:
    """A text with its tokens; a language model cannot tell when they were said."""
    text = model.text_of(written.ids)
    pieces, before = [], ""
    for n in range(1, len(written.ids) + 1):
        now = model.tokenizer.decode(list(written.ids[:n]), skip_special_tokens=True)
        # A character that ends in a later token is written with that one.
        now = before if now.endswith("\ufffd") and n < len(written.ids) else now
        pieces.append(now[len(before) :])
        before = now
    tokens = tuple(TranscriptToken(p, c) for p, c in zip(pieces, written.probabilities, strict=False) if p)
    return Transcript(text, tokens, usage)


def _shares(config: MTSKConfig) -> bool:
    """Whether two pairs with one audio rate read the same start: one adapter, and a search that can go on from it."""
    return config.lora.strategy == "MS" and config.decode.beams == 1
