"""From what the encoder and the CTC head made of a batch to transcripts: gate, denoise, choose, certify, time words.

Source: dLLM-ASR (arXiv 2601.17902), section on inference, whose loop is one sampler of `backbones.samplers`
(`PriorGuidedSampler`). What differs: any other sampler may decode; a recording whose draft is sure everywhere is not
read by the language model (self-speculative decoding, arXiv 2603.11243); several responses of a recording are rows of
one batch; the text can be certified (see `certify`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from tokenthrift.backbones.masked import Context, MaskedDiffusionBackbone
from tokenthrift.backbones.samplers import (
    SAMPLERS,
    DaedalSampler,
    PriorGuidedSampler,
    Sampler,
    TokenIds,
    sample,
    sample_ragged,
)
from tokenthrift.backbones.samplers import Canvas as SamplerCanvas
from tokenthrift.backbones.whisper_decoder import WhisperDecoderBackbone
from tokenthrift.budget import BudgetError, DecodeBudget, TokenUsage
from tokenthrift.dllm_asr.canvas import Canvas, build_canvas, stack_canvases
from tokenthrift.dllm_asr.certify import Certification, Certified, CertifyOptions, Draft, Spelling, certify_together
from tokenthrift.dllm_asr.config import DecodeConfig, DllmAsrConfig, DraftUse
from tokenthrift.dllm_asr.draft import DraftWord, ctc_log_likelihood, draft_entropy, length_guard
from tokenthrift.dllm_asr.hotwords import Hotwords
from tokenthrift.dllm_asr.n_best import by_risk, sampled_drafts
from tokenthrift.dllm_asr.rates import STATE_RATE, Rate
from tokenthrift.dllm_asr.reading import BatchReader, causal_readers, check_causal
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.dllm_asr.word_times import time_tokens, time_words, word_positions
from tokenthrift.transcript import Transcript, TranscriptToken

if TYPE_CHECKING:  # transformers is slow to import, and Whisper's decoder needs none of it
    from tokenthrift.backbones.prefix import PrefixBackbone

__all__ = ["Batch", "Parts", "make_sampler", "settings_for", "transcribe_batch"]

THRESHOLDED = ("prior_guided", "fast_dllm", "daedal")
"""Samplers that commit by a threshold."""


class Parts(Protocol):
    """What of a model decoding needs."""

    config: DllmAsrConfig
    vocabulary: Vocabulary
    backbone: MaskedDiffusionBackbone

    def canvases(
        self,
        drafts: Sequence[Sequence[DraftWord]],
        lengths: Tensor,
        settings: DecodeConfig,
        rates: Sequence[Rate] | None = None,
    ) -> list[Canvas]:
        """The responses that the denoiser starts from."""
        ...

    def max_slots(self, states: int, rate: Rate | None = None) -> int:
        """Most slots of a response."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Recordings, encoded and drafted.

    Attributes:
        log_p: `(B, N, 29)` CTC log-probabilities.
        drafts: words that the denoiser starts from and that are verified.
        own_drafts: words of the CTC head, which `drafts` are unless another model drafts; they guard the length.
        lengths: `(B,)` encoder states.
        memory, memory_mask: what the language model reads, `(B, M, memory_size)` and `(B, M)`.
        rates: at which it reads each recording.
    """

    log_p: Tensor
    drafts: Sequence[Sequence[DraftWord]]
    own_drafts: Sequence[Sequence[DraftWord]]
    lengths: Tensor
    memory: Tensor
    memory_mask: Tensor
    rates: Sequence[Rate]

    def posteriors(self, row: int) -> Tensor:
        """`(N, 29)` of one recording, without padding."""
        return self.log_p[row, : int(self.lengths[row])]


@dataclass(frozen=True, slots=True)
class Response:
    """A text for a recording.

    Attributes:
        text: as written.
        pieces: what its tokens write.
        ids: its tokens.
        confidence: of each token.
        times: of each token in seconds; None where slots did not stay in their positions.
        rounds: passes of the language model.
    """

    text: str
    pieces: list[str]
    ids: list[int]
    confidence: list[float]
    times: list[tuple[float, float]] | None
    rounds: int


def make_sampler(settings: DecodeConfig, limits: DecodeBudget, longest: int) -> Sampler:
    """The sampler that decoding settings name, with those of its options that they say.

    Args:
        settings: of the model or the call.
        limits: may name another threshold.
        longest: most slots of a canvas that grows.
    """
    threshold = limits.confidence_threshold or settings.confidence_threshold
    if settings.sampler == "prior_guided":
        return PriorGuidedSampler(
            threshold=threshold,
            prune=settings.prune,
            verify_threshold=settings.verify_threshold or None,
            verify_committed=settings.verify_committed,
        )
    if settings.sampler == "daedal":
        return DaedalSampler(max_length=longest, high=threshold, drafts=True, grow=False)
    kind = SAMPLERS[settings.sampler]
    return kind(threshold=threshold) if settings.sampler in THRESHOLDED else kind()  # type: ignore[call-arg]


def settings_for(limits: DecodeBudget, settings: DecodeConfig, sampler: Sampler | None = None) -> DecodeConfig:
    """The settings under the limits of a call: what limits the denoiser is honored by denoising, or refused.

    Args:
        limits: of the call.
        settings: of the model or the call.
        sampler: of the call, where it names one.

    Raises:
        BudgetError: limits of the denoiser or several texts beside `certify`, whose draft is that of the CTC head, so
            that the denoiser does not run; or a threshold for a sampler that has none.
    """
    if limits.confidence_threshold is not None and settings.sampler not in THRESHOLDED:
        raise BudgetError(
            f"confidence_threshold={limits.confidence_threshold} with sampler {settings.sampler!r}, which has none",
            f"one of the samplers {', '.join(THRESHOLDED)}",
            "no confidence_threshold",
        )
    named = [name for name in ("max_rounds", "confidence_threshold", "hotwords") if getattr(limits, name)]
    named += ["sampler"] if sampler is not None else []
    if settings.certify_draft != "ctc" or not (limits.certify or settings.certify):
        return settings
    if not named and settings.n_best > 1:
        raise BudgetError(
            f"n_best={settings.n_best} with the certified draft of the CTC head, beside which nothing is drawn",
            "n_best where the denoiser runs: certify=None, or certify_draft 'denoised' or 'both'",
            "n_best=1",
        )
    if not named:
        return settings
    if limits.certify:
        raise BudgetError(
            f"{' and '.join(named)} with certify={limits.certify!r}",
            "limits of the denoiser where it runs; the certified draft is that of the CTC head",
            "max_new_tokens",
        )
    return replace(settings, certify=None)


def transcribe_batch(
    model: Parts, batch: Batch, limits: DecodeBudget, settings: DecodeConfig, sampler: Sampler | None = None
) -> list[Transcript]:
    """Transcripts of a batch; see `DllmAsr.decode`."""
    certified = limits.certify or settings.certify
    if certified:
        check_causal(model.backbone, model.config.backbone.family)
    count = len(batch.drafts)
    gated = not certified and settings.draft_entropy > 0 and batch.drafts is batch.own_drafts
    found: list[list[Response]] = [[] for _ in range(count)]
    for row in range(count):
        if gated and settings.draft_entropy >= draft_entropy(batch.posteriors(row)):
            found[row].append(_as_drafted(model, batch, row, limits))
    denoised = not certified or settings.certify_draft != "ctc"
    going = [row for row in range(count) if denoised and not found[row]]
    for row, response in _denoise(model, batch, going, limits, settings, sampler):
        found[row].append(response)
    ranked = [
        [responses[at] for at in _order(batch.posteriors(row), [r.text for r in responses], settings)]
        for row, responses in enumerate(found)
    ]
    texts = _certify(model, batch, ranked, limits, settings) if certified else []
    out = []
    for row, responses in enumerate(found):
        best = ranked[row][0] if responses else None
        rounds = max((r.rounds for r in responses), default=0)
        usage = TokenUsage(
            native=int(batch.lengths[row]),
            cap=batch.rates[row].positions,
            used=batch.rates[row].positions,
            rounds=rounds,
        )
        alternatives = tuple(response.text for response in ranked[row][1:]) if settings.n_best > 1 else ()
        if certified:
            done = texts[row]
            usage = replace(usage, rounds=rounds + done.passes, accepted=done.accepted, written=done.written)
            best = _response(model.vocabulary, done.ids, done.probabilities, None, done.passes)
        assert best is not None
        out.append(_transcript(batch.posteriors(row), best, usage, alternatives))
    return out


def _as_drafted(model: Parts, batch: Batch, row: int, limits: DecodeBudget) -> Response:
    """The draft as it is, which no pass has read."""
    canvas = build_canvas(batch.drafts[row], model.vocabulary, 0.0, 0.0, 0)
    canvas = canvas.first(model.max_slots(int(batch.lengths[row]), batch.rates[row])).first(limits.max_new_tokens)
    return _response(model.vocabulary, canvas.ids, canvas.confidence, canvas.times, 0)


def _denoise(
    model: Parts,
    batch: Batch,
    going: Sequence[int],
    limits: DecodeBudget,
    settings: DecodeConfig,
    sampler: Sampler | None,
) -> list[tuple[int, Response]]:
    """Responses of the recordings `going`, each with its row; several for a recording, in whole turns of the batch."""
    if not going:
        return []
    vocabulary, device = model.vocabulary, batch.memory.device
    lengths, rates = batch.lengths[torch.tensor(going)], [batch.rates[row] for row in going]
    uses: tuple[DraftUse, ...] = ("confident", "length") if settings.draft == "both" else (settings.draft,)
    canvases: list[Canvas] = []
    samples = [sampled_drafts(batch.posteriors(row), settings.n_best) for row in going] if settings.n_best > 1 else None
    for draw in range(settings.n_best):
        drafts: list[Sequence[DraftWord]] = [batch.drafts[row] for row in going]
        if samples is not None and draw:
            # Letters drawn from silence are no speech.
            drafts = [own[draw] if first else first for own, first in zip(samples, drafts, strict=True)]
        for use in uses:
            canvases += model.canvases(drafts, lengths, replace(settings, draft=use), rates)
    canvases = [canvas.first(limits.max_new_tokens) for canvas in canvases]
    rows = list(going) * (len(canvases) // len(going))
    recording = torch.tensor(rows, device=device)
    ids, mask, windows, hints = (part.to(device) for part in stack_canvases(canvases, vocabulary))
    pooled = torch.tensor([rate.pool for rate in batch.rates], device=device)[recording]
    windows = windows * (STATE_RATE / (pooled * model.config.adapter.stride))[:, None, None]
    context = model.backbone.context(batch.memory, batch.memory_mask)
    hotwords = Hotwords(limits.hotwords, vocabulary, settings.hotword_boost) if limits.hotwords else None
    # A canvas that grows has as much room as its own recording leaves, whatever stands beside it.
    room = [model.max_slots(int(n), rate) for n, rate in zip(lengths, rates, strict=True)]
    samplers = [
        sampler or make_sampler(settings, limits, min(slots, limits.max_new_tokens or slots)) for slots in room
    ] * (len(canvases) // len(going))
    moves = isinstance(samplers[0], DaedalSampler)  # inserts slots, so what was known of a slot is another's

    active = None
    if settings.active_halo is not None:
        active = _active(model, context.select(recording), hints, settings, moves)

    def predict(now: Tensor, alive: Tensor, rows: Tensor) -> Tensor:
        if moves:
            logits = cast(Tensor, model.backbone(now, alive, context.select(recording[rows])))
        else:
            near, hint = windows[rows, : now.shape[1]], hints[rows, : now.shape[1]]
            if active is not None:
                logits = active(now, alive, rows)
            else:
                logits = cast(Tensor, model.backbone(now, alive, context.select(recording[rows]), near, hint))
            # A slot that belongs to a word of the draft cannot end the text; only the extra ones after it can.
            logits[..., vocabulary.eos_id].masked_fill_(torch.isfinite(near[..., 1]), float("-inf"))
        return logits if hotwords is None else hotwords.boosted(logits, now)

    tokens = TokenIds(vocabulary.mask_id, vocabulary.eos_id, delete=vocabulary.delete_id)
    most = limits.max_rounds
    if len(canvases) <= settings.max_rows and all(own == samplers[0] for own in samplers):
        whole = sample(predict, SamplerCanvas(ids, mask), samplers[0], tokens, max_rounds=most)
        found = [(whole, row) for row in range(len(canvases))]
        texts = whole.text_slots()
    else:
        each = [SamplerCanvas(ids[row : row + 1], mask[row : row + 1]) for row in range(len(canvases))]
        alone = sample_ragged(predict, each, samplers, tokens, max_rows=settings.max_rows, max_rounds=most)
        found = [(done, 0) for done in alone]
        texts = [done.text_slots()[0] for done in alone]
    out = []
    for i, ((done, row), slots, canvas) in enumerate(zip(found, texts, canvases, strict=True)):
        written, sure = done.ids[row].tolist(), done.confidence[row].tolist()
        if not moves:
            # Where no forward pass read the slot, the confidence is that of the draft.
            sure = [own if math.isnan(c) else c for c, own in zip(sure, canvas.confidence, strict=False)]
        chances = [0.0 if math.isnan(sure[slot]) else sure[slot] for slot in slots]
        times = None if moves else [canvas.times[slot] for slot in slots]
        out.append((rows[i], _response(vocabulary, [written[s] for s in slots], chances, times, int(done.rounds[row]))))
    return out


def _active(
    model: Parts, context: Context, hints: Tensor, settings: DecodeConfig, moves: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What reads only open or changed slots and their neighbors; see `backbones.active`."""
    if isinstance(model.backbone, WhisperDecoderBackbone) or moves:
        raise ValueError("active_halo needs a language model that reads the memory as a prefix, and slots that stay")
    from tokenthrift.backbones.active import ActiveBackbone

    lm = cast("PrefixBackbone", model.backbone)
    return ActiveBackbone(lm, context, hints=hints, halo=settings.active_halo, refresh=settings.active_refresh)


def _order(log_p: Tensor, texts: Sequence[str], settings: DecodeConfig) -> list[int]:
    """Positions of the responses, the best first: by risk where several drafts were drawn, else by CTC likelihood."""
    if settings.n_best > 1:
        return by_risk(texts)
    if len(texts) < 2:
        return list(range(len(texts)))
    return sorted(range(len(texts)), key=lambda position: -ctc_log_likelihood(log_p, texts[position]))


def _ctc_draft(words: Sequence[DraftWord]) -> Draft:
    return Draft([word.text for word in words], [word.confidence for word in words])


def _denoised_draft(response: Response) -> Draft:
    return Draft(response.text.split(), _word_confidence(response))


def _word_confidence(response: Response) -> list[float]:
    """Of each word of a text, that of its least sure token; a token may write several words."""
    sure = [1.0] * len(response.text.split())
    for piece, word, confidence in zip(
        response.pieces, word_positions(response.pieces), response.confidence, strict=True
    ):
        for own in range(word, word + len(piece.split())):
            sure[own] = min(sure[own], confidence)
    return sure


def _certify(
    model: Parts, batch: Batch, denoised: Sequence[Sequence[Response]], limits: DecodeBudget, settings: DecodeConfig
) -> list[Certified]:
    """The certified text of each recording, whose denoised responses are given, the best first, where there are any."""
    vocabulary = model.vocabulary
    forbidden = (vocabulary.mask_id, vocabulary.start_id, vocabulary.delete_id)
    options = CertifyOptions(max_rejection_prob=settings.certify_rejection_prob)
    spelling = Spelling(vocabulary.piece, vocabulary.cut)
    runs = []
    for row, reader in enumerate(causal_readers(model.backbone, batch.memory, batch.memory_mask)):
        drafts = []
        if settings.certify_draft != "denoised":
            drafts.append(_ctc_draft(batch.drafts[row]))
        drafts += [_denoised_draft(response) for response in denoised[row][:1]]
        limit = length_guard(batch.own_drafts[row], vocabulary)
        limit = min(limit, limits.max_new_tokens or limit)
        run = Certification(
            reader, drafts, spelling, limit=limit, end=vocabulary.eos_id, forbidden=forbidden, options=options
        )
        runs.append(run)
    return certify_together(runs, BatchReader(), settings.max_rows)


def _response(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    confidence: Sequence[float],
    times: Sequence[tuple[float, float]] | None,
    rounds: int,
) -> Response:
    pieces = vocabulary.pieces(ids)
    return Response(
        "".join(pieces).strip(), pieces, list(ids), list(confidence), None if times is None else list(times), rounds
    )


def _transcript(log_p: Tensor, response: Response, usage: TokenUsage, alternatives: tuple[str, ...]) -> Transcript:
    words = time_words(log_p, response.text.split(), _word_confidence(response))
    times = time_tokens(response.pieces, words) if response.times is None else response.times
    tokens = tuple(
        TranscriptToken(piece, confidence, *time)
        for piece, confidence, time in zip(response.pieces, response.confidence, times, strict=True)
        if piece
    )
    return Transcript(response.text, tokens, usage, words, alternatives)
