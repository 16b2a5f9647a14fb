"""dLLM-ASR: frozen Whisper encoder, CTC draft, and a masked-diffusion language model that denoises what it must.

Source: dLLM-ASR (arXiv 2601.17902). A recording is encoded once; the CTC head on the same states writes a draft; its
unsure words become open slots, and the language model commits what it is sure of, round after round, until nothing is
open.

What differs from the released code, which decodes one recording on a fixed canvas of 256 slots without a draft: batches
of unequal recordings with the result of each alone, the encoder runs over the audio that is there, the canvas comes
from the draft and shrinks after every round, drafts are verified, and every transcript says what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift.backbones.masked import MaskedDiffusionBackbone
from tokenthrift.budget import BudgetSupport, DecodeBudget, TokenUsage
from tokenthrift.dllm_asr.adapter import Adapter, adapted_length
from tokenthrift.dllm_asr.config import BackboneConfig, DecodeConfig, DllmAsrConfig, DraftUse
from tokenthrift.dllm_asr.denoise import denoise
from tokenthrift.dllm_asr.draft import Canvas, DraftHead, DraftWord, canvas_of, draft_words, likelihood
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.hub import HubModel
from tokenthrift.transcript import Transcript, TranscriptToken
from tokenthrift.whisper import MAX_STATES, SAMPLE_RATE, WhisperEncoder, length_mask, log_mel, pad_mels, states_of

__all__ = ["DllmAsr", "make_backbone"]

STATE_RATE = 50.0  # encoder states a second
BATCH_STATES = 12_000  # encoder states, padding included, that go through the encoder at once: 4 minutes


def make_backbone(config: BackboneConfig, vocab_size: int, vocabulary: Vocabulary) -> MaskedDiffusionBackbone:
    """The language model of a configuration, with random weights.

    Args:
        config: family and sizes.
        vocab_size: rows of the embedding.
        vocabulary: gives the ids of MASK and START.
    """
    if config.family == "whisper":
        from tokenthrift.backbones.whisper_decoder import WhisperDecoder, WhisperDecoderBackbone

        decoder = WhisperDecoder(vocab_size, config.width, config.layers, config.heads, config.ffn, config.positions)
        return WhisperDecoderBackbone(decoder, vocabulary.mask_id, (vocabulary.start_id,))
    from tokenthrift.backbones.prefix import PrefixBackbone, language_model

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.positions,
    }
    lm = language_model({"model_type": config.family, **sizes})
    return PrefixBackbone(lm, vocabulary.mask_id, prompt=(vocabulary.start_id,))


class DllmAsr(HubModel):
    """Speech to text by a masked-diffusion language model; a `Recogniser`.

    Args:
        config: sizes and decoding defaults.
        vocabulary: words to tokens; `config.vocab_size` of them.
    """

    system: ClassVar[str] = "dllm_asr"
    config_class: ClassVar[type] = DllmAsrConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    config: DllmAsrConfig
    support: ClassVar[BudgetSupport] = BudgetSupport(fields=frozenset())  # the adapter's rate is fixed: see `plan`
    sample_rate = SAMPLE_RATE
    max_seconds = 30.0

    def __init__(self, config: DllmAsrConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config)
        if vocabulary.size != config.vocab_size:
            raise ValueError(f"the tokenizer has {vocabulary.size} tokens, the configuration says {config.vocab_size}")
        self.vocabulary = vocabulary
        sizes = config.encoder
        self.encoder = WhisperEncoder(sizes.width, sizes.layers, sizes.heads, sizes.ffn, sizes.bins)
        self.encoder.requires_grad_(False)
        self.draft = DraftHead(config.draft, sizes.width)
        self.backbone = make_backbone(config.backbone, config.vocab_size, vocabulary)
        self.adapter = Adapter(config.adapter, sizes.width, self.backbone.memory_size)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The vocabulary."""
        return {"vocabulary": Vocabulary.load(folder / "tokenizer.json")}

    def write_assets(self, folder: Path) -> None:
        """The vocabulary."""
        self.vocabulary.save(folder / "tokenizer.json")

    def plan(self, samples: Sequence[int]) -> list[int]:
        """Memory positions that recordings of so many samples at 16 kHz will cost the language model."""
        return [adapted_length(states_of(n), self.config.adapter) for n in samples]

    def room(self, states: int) -> int:
        """Slots that a recording of so many encoder states leaves for its response.

        Raises:
            ValueError: none, because the recording fills the positions of a model that reads it as a prefix.
        """
        positions = self.config.backbone.positions
        prefix = 0 if self.config.backbone.family == "whisper" else adapted_length(states, self.config.adapter)
        slots = positions - prefix - 1  # one for the token that comes before the response
        if slots < 1:
            seconds = states / STATE_RATE
            raise ValueError(f"{seconds:.1f} s of audio leave no room for text in a model of {positions} positions")
        return slots

    @torch.inference_mode()
    def encode(self, audio: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Encoder states of recordings.

        Args:
            audio: `(samples,)` each, mono at 16 kHz, at most 30 s.

        Returns:
            `(B, N, width)` states, zero after each recording, and their lengths `(B,)`.

        Raises:
            ValueError: a recording is longer than 30 s, has several channels, or holds NaN; the message says which.
        """
        check_audio(audio)
        weight = self.encoder.conv1.weight
        tail, most = round(self.config.encoder.tail * SAMPLE_RATE), round(self.max_seconds * SAMPLE_RATE)
        heard = [F.pad(samples.to(weight.device), (0, max(0, min(tail, most - len(samples))))) for samples in audio]
        mels, frames = pad_mels([log_mel(samples, self.config.encoder.bins) for samples in heard])
        lengths = torch.tensor([states_of(len(samples)) for samples in audio], device=frames.device)
        states = self.encoder(mels.to(weight.dtype), frames)[:, : int(lengths.max())]
        return states.masked_fill(~length_mask(lengths, states.shape[1])[..., None], 0.0), lengths

    def transcribe(self, audio: Sequence[Tensor], budget: DecodeBudget | None = None) -> list[Transcript]:
        """Transcribes recordings; the result of each is that of the recording alone.

        Args:
            audio: `(samples,)` float each, mono at 16 kHz in [-1, 1], at most 30 s.
            budget: ceilings for each recording; the model's own defaults if not given.

        Raises:
            ValueError: as `encode`, before anything is transcribed.
        """
        check_audio(audio)
        results: dict[int, Transcript] = {}
        order = sorted(range(len(audio)), key=lambda i: len(audio[i]), reverse=True)
        while order:
            heard = states_of(len(audio[order[0]]) + round(self.config.encoder.tail * SAMPLE_RATE))
            rows = order[: max(1, BATCH_STATES // min(MAX_STATES, max(1, heard)))]
            order = order[len(rows) :]
            results.update(zip(rows, self.decode(*self.encode([audio[i] for i in rows]), budget), strict=True))
        return [results[i] for i in range(len(audio))]

    @torch.inference_mode()
    def decode(
        self, states: Tensor, lengths: Tensor, budget: DecodeBudget | None = None, settings: DecodeConfig | None = None
    ) -> list[Transcript]:
        """Transcribes encoded recordings.

        Args:
            states: `(B, N, width)`; what stands after the end of a recording is not read.
            lengths: `(B,)` states of each recording.
            budget: ceilings for each recording.
            settings: how to decode, in place of the model's own.
        """
        settings = settings or self.config.decode
        budget = budget or DecodeBudget()
        budget = replace(budget, max_rounds=budget.max_rounds or settings.max_rounds)
        log_p, drafts = self._drafts(states, lengths)
        ways: tuple[DraftUse, ...] = ("confident", "length") if settings.draft == "both" else (settings.draft,)
        canvases = [c for way in ways for c in self.canvases(drafts, lengths, replace(settings, draft=way))]
        canvases = [c.clipped(budget.max_new_tokens) for c in canvases]
        utterance = torch.arange(len(states), device=states.device).repeat(len(ways))  # of each canvas
        width = max(1, *(len(c.ids) for c in canvases))
        end = self.vocabulary.eos_id
        ids = torch.tensor([c.ids + [end] * (width - len(c.ids)) for c in canvases], device=states.device)
        mask = torch.arange(width) < torch.tensor([len(c.ids) for c in canvases])[:, None]
        memory, memory_mask = self.adapter(states, lengths)
        anywhere = [(0.0, math.inf)]
        windows = torch.tensor([c.windows + anywhere * (width - len(c.ids)) for c in canvases], device=states.device)
        windows = windows * (STATE_RATE / self.adapter.rate)
        none = self.vocabulary.mask_id
        hints = torch.tensor([c.hints + [none] * (width - len(c.ids)) for c in canvases], device=states.device)
        context = self.backbone.context(memory, memory_mask)

        def predict(now: Tensor, alive: Tensor, rows: Tensor) -> Tensor:
            near, hint = windows[rows, : now.shape[1]], hints[rows, : now.shape[1]]
            logits = cast(Tensor, self.backbone(now, alive, context.select(utterance[rows]), near, hint))
            # A slot that belongs to a word of the draft cannot end the text; only the spare ones after it can.
            logits[..., end].masked_fill_(torch.isfinite(near[..., 1]), float("-inf"))
            return logits

        done = denoise(
            predict,
            ids,
            mask.to(states.device),
            mask_id=self.vocabulary.mask_id,
            eos_id=self.vocabulary.eos_id,
            delete_id=self.vocabulary.delete_id,
            budget=budget,
            threshold=settings.confidence_threshold,
            prune=settings.prune,
            verify=settings.verify or None,
            recheck=settings.recheck,
        )
        slots = done.text_slots()
        texts = [
            self.vocabulary.text([found[i] for i in at]) for found, at in zip(done.ids.tolist(), slots, strict=True)
        ]
        used = memory_mask.sum(1).tolist()
        transcripts = []
        for row, n in enumerate(lengths.tolist()):
            rows = range(row, len(canvases), len(states))
            best = row if len(ways) == 1 else max(rows, key=lambda r: likelihood(log_p[row, :n], texts[r]))
            found, sure, canvas = done.ids[best].tolist(), done.confidence[best].tolist(), canvases[best]
            pieces = self.vocabulary.pieces([found[i] for i in slots[best]])
            tokens = tuple(
                TranscriptToken(piece, _known(sure[i], canvas.confidence[i]), *canvas.times[i])
                for i, piece in zip(slots[best], pieces, strict=True)
                if piece
            )
            rounds = max(int(done.rounds[r]) for r in rows)
            usage = TokenUsage(native=n, cap=used[row], used=used[row], rounds=rounds)
            transcripts.append(Transcript(texts[best], tokens, usage))
        return transcripts

    @torch.inference_mode()
    def drafts(self, states: Tensor, lengths: Tensor) -> list[list[DraftWord]]:
        """The CTC words of encoded recordings."""
        return self._drafts(states, lengths)[1]

    def _drafts(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, list[list[DraftWord]]]:
        log_p = self.draft(states, lengths).cpu()
        return log_p, [draft_words(row[:n]) for row, n in zip(log_p, lengths.tolist(), strict=True)]

    def canvases(self, drafts: Sequence[Sequence[DraftWord]], lengths: Tensor, settings: DecodeConfig) -> list[Canvas]:
        """The responses the denoiser starts from; a recording without a single draft word has an empty one."""
        out = []
        for words, n in zip(drafts, lengths.tolist(), strict=True):
            if settings.draft == "none":
                seconds = n / STATE_RATE
                slots = max(4, round(seconds * settings.tokens_per_second) + settings.margin)
                slots = min(slots, self.room(n))
                masks = [self.vocabulary.mask_id] * slots
                canvas = Canvas()
                canvas.extend(masks, masks, 0.0, 0.0, seconds, tail=True)
            elif not words:
                canvas = Canvas()
            else:
                threshold = 2.0 if settings.draft == "length" else settings.draft_threshold
                # Very fast speech has no room for spare slots: they go before any word does.
                for slack, spare in ((settings.slack, 1), (0.0, 1), (0.0, 0)):
                    canvas = canvas_of(words, self.vocabulary, threshold, slack, settings.margin, spare)
                    if len(canvas.ids) <= self.room(n):
                        break
            out.append(canvas.clipped(self.room(n)))
        return out


def check_audio(audio: Sequence[Tensor]) -> None:
    """Raises a ValueError that names the first recording that no Whisper encoder can read."""
    for i, samples in enumerate(audio):
        if samples.ndim != 1:
            raise ValueError(f"audio {i} must be one channel of shape (samples,), got {tuple(samples.shape)}")
        if states_of(len(samples)) > MAX_STATES:
            seconds, most = len(samples) / SAMPLE_RATE, MAX_STATES / STATE_RATE
            raise ValueError(f"audio {i} has {seconds:.2f} s, at most {most:.0f} s fit one pass; cut it into windows")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError(f"audio {i} holds NaN or infinite samples")


def _known(confidence: float, otherwise: float) -> float:
    """The language model's probability of a token; the draft's where no forward pass saw the slot."""
    return otherwise if math.isnan(confidence) else confidence
