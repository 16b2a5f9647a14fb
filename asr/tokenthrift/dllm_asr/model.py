"""dLLM-ASR: frozen Whisper encoder, CTC draft, and a masked-diffusion language model that denoises what it must.

Source: dLLM-ASR (arXiv 2601.17902). A recording is encoded once; the CTC head on the same states writes a draft; words
of low confidence become open slots, and the language model commits tokens of high confidence, round after round, until
no slot is open.

What differs from the released code, which decodes one recording on a fixed canvas of 256 slots without a draft: batches
of unequal recordings with the result of each alone, the encoder runs over the audio that is there, the canvas comes
from the draft and shrinks after every round, drafts are verified, and every transcript says what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenthrift.auto.processing import speech_files
from tokenthrift.backbones.samplers import Sampler
from tokenthrift.backbones.whisper_decoder import WhisperDecoderBackbone
from tokenthrift.budget import (
    BudgetLike,
    BudgetSupport,
    DecodeBudget,
    DecodeLike,
    ItemSize,
    NativeCost,
    SizeLike,
    TokenBudget,
    TokenUsage,
    budgets_for,
    sizes_of,
)
from tokenthrift.dllm_asr.adapter import Adapter
from tokenthrift.dllm_asr.canvas import Canvas, build_canvas
from tokenthrift.dllm_asr.config import DecodeConfig, DllmAsrConfig, upgrade_version_1
from tokenthrift.dllm_asr.decoding import Batch, settings_for, transcribe_batch
from tokenthrift.dllm_asr.draft import DraftHead, DraftWord, draft_words
from tokenthrift.dllm_asr.external_draft import draft_of
from tokenthrift.dllm_asr.language_model import (
    completed,
    make_backbone,
    prompt_positions,
    read_vocabulary,
)
from tokenthrift.dllm_asr.punctuation import PunctuationHead, punctuated
from tokenthrift.dllm_asr.rates import STATE_RATE, Rate, adapted_length, choose_rate, support_of
from tokenthrift.dllm_asr.sources import PUNCTUATION, fill_external, leave_out_external, miss_external
from tokenthrift.dllm_asr.step_audio import StepAudioAdapter
from tokenthrift.dllm_asr.vocabulary import Vocabulary
from tokenthrift.hub import HubModel, read_config
from tokenthrift.layout import lay_out_by_columns
from tokenthrift.padding import pad_rows
from tokenthrift.sources import fetch
from tokenthrift.transcript import Recognizer, Transcript
from tokenthrift.weights import assign_weights, write_weights
from tokenthrift.whisper import MAX_STATES, SAMPLE_RATE, WhisperEncoder, encode_recordings, states_of

__all__ = ["STATE_RATE", "DllmAsr"]

BATCH_STATES = 12_000  # encoder states, padding included, that go through the encoder at once: 4 minutes


class DllmAsr(HubModel):
    """Speech to text by a masked-diffusion language model; a `Recognizer`. In evaluation mode until it is trained.

    Args:
        config: sizes and decoding defaults.
        vocabulary: words to tokens; `config.vocab_size` of them.
        base_dir: the model's folder, against which relative names of sources are read first.
    """

    system: ClassVar[str] = "dllm_asr"
    config_class: ClassVar[type] = DllmAsrConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    config: DllmAsrConfig
    native_cost: ClassVar[NativeCost] = NativeCost(per_second=STATE_RATE)
    sample_rate = SAMPLE_RATE
    max_seconds = 30.0
    certified_parts: ClassVar[tuple[str, ...]] = ("backbone",)
    """What certified text comes from; see `recognizers.precision`."""
    gives_times: ClassVar[bool] = True
    draft_model: Recognizer | None = None
    """Another recognizer with word times, as a CTC model of transformers; its words are the draft."""

    def __init__(self, config: DllmAsrConfig, vocabulary: Vocabulary, base_dir: Path | None = None) -> None:
        config = completed(config, base_dir)
        super().__init__(config)
        self.base_dir = base_dir
        if vocabulary.size != config.vocab_size:
            raise ValueError(f"the tokenizer has {vocabulary.size} tokens, the configuration says {config.vocab_size}")
        self.vocabulary = vocabulary
        sizes = config.encoder
        self.encoder = WhisperEncoder(
            sizes.hidden_size,
            sizes.num_hidden_layers,
            sizes.num_attention_heads,
            sizes.intermediate_size,
            sizes.num_mel_bins,
        )
        self.encoder.requires_grad_(False)
        has_frontend = sizes.kind == "step_audio"
        if has_frontend:
            self.encoder.layer_norm = torch.nn.Identity()  # type: ignore[assignment]
        self.draft = DraftHead(config.draft, sizes.hidden_size)
        self.backbone = make_backbone(config.backbone, config.vocab_size, vocabulary)
        widths = (sizes.hidden_size, self.backbone.memory_size)
        self.adapter = StepAudioAdapter(*widths) if has_frontend else Adapter(config.adapter, *widths)
        self.plain = False  # lower-case words even where there is a head for casing and punctuation
        self.punctuation: PunctuationHead | None = None
        if config.punctuation is not None:
            self.punctuation = PunctuationHead(config.backbone.hidden_size, config.punctuation)
        self.register_state_dict_post_hook(leave_out_external)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(miss_external)  # type: ignore[no-untyped-call]
        self.eval()

    @property
    def support(self) -> BudgetSupport:
        """The ceilings of a TokenBudget that are honored: none where the adapter was trained at one rate."""
        return support_of(self.config.adapter)

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Folders of format_version 1 had names of their own for sizes and slots."""
        return upgrade_version_1(fields)

    @classmethod
    def needed_files(cls, config: DllmAsrConfig) -> tuple[str, ...]:
        """The vocabulary may be that of a published language model; the head of casing has a file of its own."""
        vocabulary = cls.asset_files if config.backbone.source is None else ()
        return vocabulary if config.punctuation is None else (*vocabulary, PUNCTUATION)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The vocabulary, and the model's folder."""
        config = completed(read_config(folder, cls), folder)
        return {"vocabulary": read_vocabulary(folder, config.backbone), "base_dir": folder}

    def write_assets(self, folder: Path) -> None:
        """The vocabulary, and the head of casing where there is one."""
        self.vocabulary.save(folder / "tokenizer.json")
        if self.punctuation is not None:
            write_weights(self.punctuation, folder / PUNCTUATION)

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """For the speech pipeline of transformers."""
        vocabulary = self.vocabulary
        return speech_files(SAMPLE_RATE, vocabulary.tokenizer.id_to_token(vocabulary.eos_id))

    def load_external(self, **options: Any) -> None:
        """Fills the parts that the configuration names by folder or Hub id, see `sources.fill_external`, and the head
        of casing; lays weights out as a processor multiplies by them soonest."""
        fill_external(self, self.base_dir, **options)
        if self.punctuation is not None and self.base_dir is not None:
            path = fetch(self.base_dir, (PUNCTUATION,)) / PUNCTUATION
            assign_weights(self.punctuation, path, torch.device("cpu"), torch.float32)
        for part in (self.encoder, self.draft):
            lay_out_by_columns(part)
        if isinstance(self.backbone, WhisperDecoderBackbone):
            lay_out_by_columns(self.backbone, self.backbone.decoder.embed_tokens.weight)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """Encoder states (`native`) and memory positions of the language model (`used`) of recordings; exact.

        A recording of more than 30 s is planned as windows of 30 s and a rest. The batch job cuts at pauses instead and
        leaves silence out, which gives at most one position more a window.

        Args:
            items: their seconds, or their native encoder states.
            budget: a ceiling chooses the finest of the rates that the adapter was trained at; an adapter of one rate
                takes none. A floor is always honored.

        Raises:
            BudgetError: a ceiling that no rate keeps to, or a floor that a recording does not reach, or no duration is
                known.
        """
        return tuple(usage for _, usage in self._rates(items, budget))

    def _rates(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike]
    ) -> list[tuple[Rate, TokenUsage]]:
        sizes = sizes_of(items)
        limits = budgets_for(budget, len(sizes))
        return [choose_rate(size, limit, self.config.adapter) for size, limit in zip(sizes, limits, strict=True)]

    def max_slots(self, states: int, rate: Rate | None = None) -> int:
        """Most slots of the response to a recording of so many encoder states.

        Args:
            states: of the encoder.
            rate: at which the language model reads them; None for that of the configuration.

        Raises:
            ValueError: none, because the recording fills the positions of a model that reads it as a prefix.
        """
        positions = self.config.backbone.max_position_embeddings
        prefix = adapted_length(states, self.config.adapter) if rate is None else rate.positions
        if self.config.backbone.family == "whisper":
            prefix = 0
        slots = positions - prefix - prompt_positions(self.backbone)
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
            `(B, N, hidden_size)` states, zero after each recording, and their lengths `(B,)`.

        Raises:
            ValueError: a recording is longer than 30 s, has several channels, or holds NaN; the message says which.
        """
        check_audio(audio)
        weight, sizes = self.encoder.conv1.weight, self.config.encoder
        if not len(audio):
            return weight.new_zeros(0, 0, sizes.hidden_size), torch.zeros(0, dtype=torch.int64, device=weight.device)
        return encode_recordings(self.encoder, audio, sizes.num_mel_bins, sizes.trailing_silence)

    def transcribe(
        self,
        audio: Sequence[Tensor],
        budget: BudgetLike | Sequence[BudgetLike] = None,
        decode: DecodeLike = None,
    ) -> list[Transcript]:
        """Transcribes recordings; the result of each is that of the recording alone.

        Args:
            audio: `(samples,)` each, mono at 16 kHz, at most 30 s.
            budget: of tokens, for each recording or a list with one for each; see `plan`.
            decode: limits of decoding for each recording; the model's own where it says nothing. Limits of the denoiser
                (rounds, threshold, hotwords) turn off a certification that only the model's own settings ask for.

        Raises:
            BudgetError: as `plan`, or limits of the denoiser beside `certify`, before anything is encoded.
            ValueError: as `encode`, before anything is transcribed.
        """
        sizes = [ItemSize(seconds=len(samples) / SAMPLE_RATE) for samples in check_audio(audio)]
        rates = [rate for rate, _ in self._rates(sizes, budget)]
        decode = DecodeBudget.parse(decode)
        settings_for(decode, self.config.decode)
        silence = round(self.config.encoder.trailing_silence * SAMPLE_RATE)
        results: dict[int, Transcript] = {}
        order = sorted(range(len(audio)), key=lambda i: len(audio[i]), reverse=True)
        while order:
            longest = min(MAX_STATES, states_of(len(audio[order[0]]) + silence))
            rows = order[: max(1, BATCH_STATES // longest)]
            order = order[len(rows) :]
            batch, own = [audio[i] for i in rows], [rates[i] for i in rows]
            states, lengths = self.encode(batch)
            drafts = None if self.draft_model is None else [draft_of(t) for t in self.draft_model.transcribe(batch)]
            done = self.decode(states, lengths, decode, rates=own, drafts=drafts)
            done = self.as_read(done, states, lengths, own)
            results.update(zip(rows, done, strict=True))
        return [results[i] for i in range(len(audio))]

    @torch.inference_mode()
    def as_read(
        self, transcripts: list[Transcript], states: Tensor, lengths: Tensor, rates: Sequence[Rate] | None = None
    ) -> list[Transcript]:
        """Transcripts with casing and punctuation, where the model has a head for them and is not `plain`.

        Args:
            transcripts: of lower-case words.
            states: `(B, N, hidden_size)` of their recordings.
            lengths: `(B,)` states of each recording.
            rates: at which the language model reads each recording; None for that of the configuration.
        """
        if self.punctuation is None or self.plain:
            return transcripts
        memory = self.adapter(states, lengths, rates)
        return punctuated(self.punctuation, self.backbone, self.vocabulary, transcripts, *memory)

    @torch.inference_mode()
    def decode(
        self,
        states: Tensor,
        lengths: Tensor,
        decode: DecodeLike = None,
        settings: DecodeConfig | None = None,
        *,
        rates: Sequence[Rate] | None = None,
        sampler: Sampler | None = None,
        drafts: Sequence[Sequence[DraftWord]] | None = None,
    ) -> list[Transcript]:
        """Transcribes encoded recordings.

        Args:
            states: `(B, N, hidden_size)`; what stands after the end of a recording is not read.
            lengths: `(B,)` states of each recording.
            decode: limits of decoding for each recording.
            settings: how to decode, in place of the model's own.
            rates: at which the language model reads each recording; None for that of the configuration.
            sampler: what denoises, in place of the one that the settings name; an object of `backbones.samplers`. It
                turns off certification as limits of the denoiser do.
            drafts: words of each recording by another model, in place of the CTC head's.

        Raises:
            BudgetError: `certify` with a language model that does not read from left to right, or as `transcribe`.
            ValueError: a hotword that cannot be written.
        """
        limits = DecodeBudget.parse(decode)
        settings = settings_for(limits, settings or self.config.decode, sampler)
        limits = replace(limits, max_rounds=limits.max_rounds or settings.max_rounds)
        if rates is None:
            rates = [choose_rate(ItemSize(native=n), TokenBudget(), self.config.adapter)[0] for n in lengths.tolist()]
        if not len(lengths):
            return []
        log_p, own_drafts = self._drafts(states, lengths)
        memory, memory_mask = self.adapter(states, lengths, rates)
        used = own_drafts if drafts is None else drafts
        batch = Batch(log_p, used, own_drafts, lengths, memory, memory_mask, rates)
        return transcribe_batch(self, batch, limits, settings, sampler)

    @torch.inference_mode()
    def drafts(self, states: Tensor, lengths: Tensor) -> list[list[DraftWord]]:
        """The CTC words of encoded recordings."""
        return self._drafts(states, lengths)[1]

    def _drafts(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, list[list[DraftWord]]]:
        if states.device.type == "cpu":  # as in `encode`
            rows = [
                self.draft(row[None, :n], lengths[i : i + 1])[0]
                for i, (row, n) in enumerate(zip(states, lengths, strict=True))
            ]
            log_p = pad_rows(rows)[0]
        else:
            log_p = self.draft(states, lengths).cpu()
        return log_p, [draft_words(row[:n]) for row, n in zip(log_p, lengths.tolist(), strict=True)]

    def canvases(
        self,
        drafts: Sequence[Sequence[DraftWord]],
        lengths: Tensor,
        settings: DecodeConfig,
        rates: Sequence[Rate] | None = None,
    ) -> list[Canvas]:
        """The responses the denoiser starts from; that of a recording without a draft word is empty, unless `draft` is
        "none"."""
        out = []
        own: Sequence[Rate | None] = rates or [None] * len(drafts)
        for words, n, rate in zip(drafts, lengths.tolist(), own, strict=True):
            most, canvas = self.max_slots(n, rate), Canvas()
            if settings.draft == "none":
                seconds = n / STATE_RATE
                slots = max(4, round(seconds * settings.slots_per_second) + settings.extra_slots_at_end)
                masks = [self.vocabulary.mask_id] * min(slots, most)
                canvas.extend(masks, masks, 0.0, 0.0, seconds, open_end=True)
            elif words:
                threshold = 2.0 if settings.draft == "length" else settings.draft_threshold
                # Very fast speech has no room for extra slots: they go before any word does.
                for ratio, extra in ((settings.extra_slots_ratio, 1), (0.0, 1), (0.0, 0)):
                    canvas = build_canvas(words, self.vocabulary, threshold, ratio, settings.extra_slots_at_end, extra)
                    if len(canvas.ids) <= most:
                        break
            out.append(canvas.first(most))
        return out


def check_audio(audio: Sequence[Tensor]) -> Sequence[Tensor]:
    """The recordings; raises a ValueError that names the first one that no Whisper encoder can read."""
    for i, samples in enumerate(audio):
        if samples.ndim != 1:
            raise ValueError(f"audio {i} must be one channel of shape (samples,), got {tuple(samples.shape)}")
        if states_of(len(samples)) > MAX_STATES:
            seconds, most = len(samples) / SAMPLE_RATE, MAX_STATES / STATE_RATE
            raise ValueError(f"audio {i} has {seconds:.2f} s, at most {most:.0f} s fit one pass; cut it into windows")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError(f"audio {i} holds NaN or infinite samples")
    return audio
