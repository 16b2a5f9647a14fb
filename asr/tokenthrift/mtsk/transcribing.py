"""From recordings to transcripts: batches of like items, one encoder pass, then the language model.

Source: Llama-MTSK (arXiv 2503.06362), section 3, inference. Differs from the published code, which transcribes one item
at a time at rates fixed for the whole run: each item has the rates of its plan, and its transcript is that of the item
alone, and a phrase that follows itself faster than anybody speaks is written once. With `compat="released"` every item
is a batch of its own, because the published counts depend on the batch, and the text is as generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenthrift.backbones.causal import PrefixCache
from tokenthrift.backbones.generation import Generation
from tokenthrift.budget import BudgetError, BudgetLike, DecodeBudget, DecodeLike, ItemSize, TokenUsage
from tokenthrift.doubt import drop_doubtful
from tokenthrift.mtsk.audiovisual.noise import estimate_snr
from tokenthrift.mtsk.coarse_to_fine import decode_in_two_passes
from tokenthrift.mtsk.config import MtskConfig
from tokenthrift.mtsk.planning import FRAMES_PER_SECOND, SAMPLE_RATE, ItemPlan, plan_items, shares_prefix
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.whisper import MAX_STATES, states_of

__all__ = ["Recording", "SpeechModel", "recordings_of", "token_limit", "transcribe_recordings", "transcript_of"]

BATCH_SECONDS = 120.0
EXTRA_TOKENS = 16


class SpeechModel(Protocol):
    """What is needed of a model to transcribe with it."""

    config: MtskConfig
    tokenizer: Tokenizer

    def encode(self, audio: Sequence[Tensor] | None = None, video: Sequence[Tensor] | None = None) -> Encoded:
        """Encoder states of a batch, for all rates."""
        ...

    def prefill(self, encoded: Encoded, rates: Rates) -> PrefixCache:
        """Reads start and audio once."""
        ...

    def generate(
        self,
        encoded: Encoded,
        rates: Rates,
        limits: Sequence[int],
        *,
        prefix: PrefixCache | None = None,
        beams: int | None = None,
    ) -> list[Generation]:
        """Decodes a batch at one pair of rates."""
        ...

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One item: sound, lips or both.

    Attributes:
        audio: (samples,) at 16 kHz.
        video: (T, H, W) mouth crops, or (T, D) states of a visual encoder, at 25 a second.
    """

    audio: Tensor | None
    video: Tensor | None

    @property
    def size(self) -> ItemSize:
        """Its lengths, as `plan` takes them."""
        return ItemSize(
            seconds=None if self.audio is None else len(self.audio) / SAMPLE_RATE,
            frames=None if self.video is None else len(self.video),
        )

    @property
    def seconds(self) -> float:
        """Duration of the longer stream."""
        size = self.size
        return max(size.seconds or 0.0, (size.frames or 0) / FRAMES_PER_SECOND)


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    recording: Recording
    plan: ItemPlan


def recordings_of(audio: Sequence[Tensor | None] | None, video: Sequence[Tensor | None] | None) -> list[Recording]:
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
            if frames.ndim not in (2, 3) or not len(frames):
                raise ValueError(
                    f"video {i} must be crops (frames, H, W) or states (frames, D), with a frame or more, got "
                    f"{tuple(frames.shape)}"
                )
            if len(frames) > MAX_STATES // 2:
                seconds = len(frames) / FRAMES_PER_SECOND
                raise ValueError(f"video {i} has {seconds:.2f} s, at most 30 s fit one pass; cut it into windows")
            if frames.is_floating_point() and not bool(torch.isfinite(frames).all()):
                raise ValueError(f"video {i} holds NaN or infinite values")
    return [Recording(samples, frames) for samples, frames in zip(sounds, pictures, strict=True)]


def transcribe_recordings(
    model: SpeechModel,
    recordings: Sequence[Recording],
    budget: BudgetLike | Sequence[BudgetLike],
    *,
    rates: Rates | None,
    decode: DecodeLike,
    beams: int | None,
    coarse_to_fine: bool,
    noise_aware: bool,
) -> list[Transcript]:
    """See `LlamaMtsk.transcribe`."""
    limits = DecodeBudget.parse(decode)
    threshold = model.config.decoding.confidence_threshold
    if limits.confidence_threshold is not None:
        if not coarse_to_fine:
            given = f"confidence_threshold={limits.confidence_threshold}"
            raise BudgetError(given, "a threshold with coarse_to_fine", "no confidence_threshold")
        threshold = limits.confidence_threshold
    if beams is None:
        beams = model.config.decoding.beams
    elif not 1 <= beams <= 64:
        raise ValueError(f"a beam search has from 1 to 64 beams, not {beams}")
    if limits.certify and beams > 1:
        raise BudgetError(f'certify="ar" with {beams} beams', "greedy decoding, which it certifies", "beams=1")
    if limits.hotwords:
        raise BudgetError(f"hotwords={limits.hotwords}", "no hotwords: this model has no slots that are open", "none")
    plans = plan_items(
        model.config,
        [recording.size for recording in recordings],
        budget,
        rates=rates,
        coarse_to_fine=coarse_to_fine and limits.max_rounds != 1,
        beams=beams,
        snrs=[estimate_snr(r.audio) if noise_aware and r.audio is not None else None for r in recordings],
    )
    tasks = [_Task(recording, plan) for recording, plan in zip(recordings, plans, strict=True)]
    # Where there is nothing, nothing was said; no pass runs.
    empty = [i for i, task in enumerate(tasks) if not task.recording.seconds]
    results = {i: Transcript("", (), replace(tasks[i].plan.last.usage, used=0, rounds=0)) for i in empty}
    silence = 0.0 if model.config.audio is None else model.config.audio.trailing_silence
    for rows in _batches(tasks, silence, one_by_one=model.config.released):
        batch = [tasks[i] for i in rows]
        results.update(zip(rows, _transcribe_batch(model, batch, limits, beams, threshold), strict=True))
    return [results[i] for i in range(len(recordings))]


def _batches(tasks: Sequence[_Task], silence: float, *, one_by_one: bool) -> Iterator[list[int]]:
    """Indices of items that use the same streams and rates, of like length; without those that have none."""
    groups: dict[tuple[Rates, Rates, int], list[int]] = {}
    for row, task in enumerate(tasks):
        if not task.recording.seconds:
            continue
        kind = 0 if task.recording.video is None else task.recording.video.ndim
        groups.setdefault((task.plan.first, task.plan.last.rates, kind), []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: tasks[row].recording.seconds, reverse=True)
        while rows:
            longest = min(30.0, tasks[rows[0]].recording.seconds + silence)
            size = 1 if one_by_one else max(1, int(BATCH_SECONDS / longest))
            yield rows[:size]
            rows = rows[size:]


def _transcribe_batch(
    model: SpeechModel, tasks: Sequence[_Task], decode: DecodeBudget, beams: int, threshold: float
) -> list[Transcript]:
    first, last = [task.plan.first for task in tasks], [task.plan.last.rates for task in tasks]
    used = {*first, *last}
    streams = [(task.recording.audio, task.recording.video) for task in tasks]
    audio = [sound for sound, _ in streams if sound is not None] if any(r.audio for r in used) else None
    video = [lips for _, lips in streams if lips is not None] if any(r.video for r in used) else None
    encoded = model.encode(audio, video)
    limits = [token_limit(model.config, task.recording.seconds, decode) for task in tasks]
    prefixes: dict[int, PrefixCache] = {}
    continues = shares_prefix(model.config, beams) and first[0] != last[0] and first[0].audio == last[0].audio

    def generate(rates: Rates, rows: list[int]) -> list[Generation]:
        # The whole batch has the same first rates, so their prefix is there for any of its rows.
        prefix = prefixes.get(rates.audio)
        if prefix is not None:
            prefix = prefix.select(rows)
        elif continues and rates.audio:
            prefix = prefixes[rates.audio] = model.prefill(encoded.select(rows), rates)
        limit = [limits[row] for row in rows]
        return model.generate(encoded.select(rows), rates, limit, prefix=prefix, beams=beams)

    tokens = [(task.plan.first_tokens, task.plan.last.usage.used) for task in tasks]
    transcripts = []
    for task, outcome in zip(tasks, decode_in_two_passes(first, last, tokens, generate, threshold), strict=True):
        usage = task.plan.last.usage
        spent = TokenUsage(native=usage.native, cap=usage.cap, used=outcome.used, rounds=outcome.rounds)
        transcripts.append(transcript_of(model, outcome.generation, task.recording.seconds, spent))
    return transcripts


def token_limit(config: MtskConfig, seconds: float, decode: DecodeBudget | None = None) -> int:
    """Most tokens to generate for an item, its end included."""
    decoding = config.decoding
    limit = decoding.max_new_tokens
    if math.isfinite(decoding.tokens_per_second):
        limit = min(limit, EXTRA_TOKENS + math.ceil(seconds * decoding.tokens_per_second))
    return limit if decode is None or decode.max_new_tokens is None else min(limit, decode.max_new_tokens)


def transcript_of(model: SpeechModel, generation: Generation, seconds: float, usage: TokenUsage) -> Transcript:
    """What was generated for an item, its tokens without times, as a language model cannot tell when they were said.

    A phrase that follows itself faster than anybody speaks is written once, which the authors' code does not do: a
    model that misses the end of a short recording writes its last word again and again.

    Args:
        model: that generated it.
        generation: tokens and their probabilities.
        seconds: of the item.
        usage: of the item.
    """
    text = model.text_of(generation.ids)
    pieces, before = [], ""
    for n in range(1, len(generation.ids) + 1):
        now = model.tokenizer.decode(list(generation.ids[:n]), skip_special_tokens=True)
        # A character that ends in a later token belongs to that one.
        now = before if now.endswith("\ufffd") and n < len(generation.ids) else now
        pieces.append(now[len(before) :])
        before = now
    tokens = tuple(TranscriptToken(p, c) for p, c in zip(pieces, generation.probabilities, strict=False) if p)
    transcript = Transcript(text, tokens, usage)
    return transcript if model.config.released else drop_doubtful(transcript, seconds)
