"""The network of Llama-MTSK: encoders, projectors, adapters and language model, at one pair of rates a call.

Source: Llama-MTSK (arXiv 2503.06362), section 3, with the key names of the published code
(`audio_proj.{k}.{0,2,3}.{weight,bias}`, k the index in the list of rates).

Differs from the published code, unless `compat="released"` asks for it: an item's result never depends on its batch
(tokens by its own length, no padding read in encoders or language model), encoders never leave evaluation mode,
adapters start at zero, the markers are trained, Whisper reads the waveform at its own level over the audio that is
there, and the last states of an utterance are kept. Stacking several rates with LayerNorm works, where it crashed for
audio; and the norm of a projector is a module of its own, where one file of the authors passed it as the `bias`
argument of a Linear, so there was none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from tokenthrift.backbones.causal import PrefixCache, generate, prefill
from tokenthrift.backbones.generation import Generation
from tokenthrift.hub import HubModel
from tokenthrift.mtsk.audiovisual.avhubert import AvHubert
from tokenthrift.mtsk.audiovisual.encoders import audio_states_of, padded_states, video_states_of
from tokenthrift.mtsk.config import Compression, MtskConfig
from tokenthrift.mtsk.external import PARTS, leave_out_external, miss_external
from tokenthrift.mtsk.language_model import build, exact_positions
from tokenthrift.mtsk.lora import Lora, attentions
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import IGNORED, MARKERS, PROMPTS, Encoded, Rows, label_rows
from tokenthrift.padding import pad_rows
from tokenthrift.reducers.pooling import pool_by_rate
from tokenthrift.whisper import WhisperEncoder, sinusoids

__all__ = ["MtskNetwork", "projectors"]

VIDEO_LORA_SCALE = 2.0


def projectors(
    rates: Sequence[int],
    state_size: int,
    hidden_size: int,
    output_size: int,
    compression: Compression,
    *,
    norm: bool = True,
) -> nn.ModuleList:
    """A projector per rate, in the order given.

    Args:
        rates: states per token.
        state_size: width of an encoder state.
        hidden_size: width between the two layers (2048 as published).
        output_size: width of the language model.
        compression: how states become a token, which says how wide a token is.
        norm: a LayerNorm at the end.
    """
    rows = []
    for rate in rates:
        input_size = state_size * (rate if compression == "stack" else 1)
        layers = [nn.Linear(input_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, output_size)]
        rows.append(nn.Sequential(*layers, *([nn.LayerNorm(output_size)] if norm else [])))
    return nn.ModuleList(rows)


class MtskNetwork(HubModel):
    """Recordings to the logits and texts of one pair of rates; `LlamaMtsk` chooses the pair.

    Args:
        config: sizes, rates, strategy.
        tokenizer: of the language model, in the format of the tokenizers library.
        base_dir: the model's folder, against which relative names of external parts are read first.
    """

    config: MtskConfig

    def __init__(self, config: MtskConfig, tokenizer: Tokenizer, base_dir: Path | None = None) -> None:
        super().__init__(config)
        self.tokenizer, self.base_dir = tokenizer, base_dir
        lm, audio, video = config.language_model, config.audio, config.video
        if tokenizer.get_vocab_size() > lm.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {lm.vocab_size}")
        self.language_model = build(lm)
        self.lora = Lora(
            attentions(self.language_model.model),
            len(config.scales),
            config.lora.strategy,
            config.lora.bottleneck,
            config.lora.scale,
        )
        shape = (config.projector_hidden_size, lm.hidden_size, config.compression)
        self.audio_encoder: WhisperEncoder | None = None
        self.video_encoder: AvHubert | None = None
        self.video_lora: Lora | None = None
        if audio is not None:
            self.audio_encoder = WhisperEncoder(
                audio.hidden_size,
                audio.num_hidden_layers,
                audio.num_attention_heads,
                audio.intermediate_size,
                audio.num_mel_bins,
            )
            self.audio_encoder.requires_grad_(False)
            self.audio_proj = projectors(config.audio_rates, audio.hidden_size, *shape, norm=config.projector_norm)
        if video is not None and not video.features_only:
            self.video_encoder = AvHubert(
                video.hidden_size,
                video.num_hidden_layers,
                video.num_attention_heads,
                video.intermediate_size,
                video.channels,
            )
            self.video_encoder.requires_grad_(video.trained)
            # The audio half of the encoder is zeros here, so its input layer never learns.
            self.video_encoder.feature_extractor_audio.requires_grad_(False)
            if video.lora:
                self.video_lora = Lora(attentions(self.video_encoder.encoder), 1, "MS", video.lora, VIDEO_LORA_SCALE)
        if video is not None:
            self.video_proj = projectors(config.video_rates, video.hidden_size, *shape, norm=config.projector_norm)
        # The authors' markers are rows of the language model's own table.
        self.markers = None if config.released else nn.Parameter(torch.randn(len(MARKERS), lm.hidden_size) * 0.02)
        self.register_state_dict_post_hook(leave_out_external)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(miss_external)  # type: ignore[no-untyped-call]
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of what is trained; frozen parts stay in evaluation mode, or batch norm would drift."""
        super().train(mode)
        for name in PARTS.values():
            part: nn.Module | None = getattr(self, name)
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        with exact_positions(self.language_model):
            return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """A tensor of the language model: its device and precision are those of the computation."""
        return cast(Tensor, self.language_model.get_input_embeddings().weight)

    def encode(self, audio: Sequence[Tensor] | None = None, video: Sequence[Tensor] | None = None) -> Encoded:
        """Encodes a batch once, for all rates.

        Args:
            audio: (samples,) each, mono at 16 kHz in [-1, 1], at most 30 s; None for video alone.
            video: (T, H, W) each, gray mouth crops at 25 frames a second, uint8 or in [0, 1]; or (T, D) each, states
                of a visual encoder; None for audio alone.
        """
        states: dict[str, Tensor] = {}
        if audio is not None:
            states["audio"], states["audio_lengths"] = self.encode_audio(audio)
        if video is not None:
            states["video"], states["video_lengths"] = self.encode_video(video)
        return Encoded(**states)

    @torch.no_grad()
    def encode_audio(self, audio: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Whisper states (B, N, D) and their lengths (B,); see `encode`."""
        if self.audio_encoder is None or self.config.audio is None:
            raise ValueError("this model takes no audio; give it video alone")
        return audio_states_of(self.audio_encoder, self.config.audio, audio, released=self.config.released)

    def encode_video(self, video: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """AV-HuBERT states (B, T, D) and their lengths (B,); see `encode`. Carries gradient where it is trained."""
        config = self.config.video
        if config is None:
            raise ValueError("this model takes no video; give it audio alone")
        if any(row.ndim == 2 for row in video):
            return padded_states(video, config.hidden_size, self.weight)
        if self.video_encoder is None:
            raise ValueError(
                f"this model has no visual encoder; give it states (frames, {config.hidden_size}) instead of crops"
            )
        trained = config.trained or self.video_lora is not None
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()), self._video_adapters():
            return video_states_of(self.video_encoder, config, video, released=self.config.released)

    def blocks(self, encoded: Encoded, rates: Rates) -> tuple[list[Tensor], list[Tensor]]:
        """The embeddings before the text, in two parts: with audio and after it.

        Args:
            encoded: B items with the streams that the rates ask for.
            rates: one of `config.scales`.

        Returns:
            B tensors (L_i, H) of start and audio, the same for all video rates, and B tensors of video and prompt.
        """
        self.scale_of(rates)
        names = dict(zip(MARKERS, self._marker_rows(), strict=True))
        heads: list[list[Tensor]] = [[] for _ in range(len(encoded))]
        tails: list[list[Tensor]] = [[] for _ in range(len(encoded))]
        if self.config.bos_id is not None:
            for row in heads:
                row.append(self.embed([self.config.bos_id]))
        for modality, rate, parts in (("audio", rates.audio, heads), ("video", rates.video, tails)):
            if not rate:
                continue
            tokens, counts = self.tokens(encoded, modality, rate)
            for row, part, n in zip(parts, tokens, counts.tolist(), strict=True):
                row += [names[f"<{modality}>"], part[:n], names[f"</{modality}>"]]
        prompt = self.embed(self.token_ids(PROMPTS[bool(rates.audio), bool(rates.video)]))
        # Without BOS and without audio the first part is empty.
        nothing = prompt[:0]
        return [torch.cat([nothing, *row]) for row in heads], [torch.cat([*row, prompt]) for row in tails]

    def tokens(self, encoded: Encoded, modality: str, rate: int) -> tuple[Tensor, Tensor]:
        """Compressed and projected states of one modality, (B, n, H), and how many each item has, (B,)."""
        states, lengths = getattr(encoded, modality), getattr(encoded, f"{modality}_lengths")
        if states is None:
            raise ValueError(f"a rate of {rate} for {modality}, but there is no {modality}")
        rates: tuple[int, ...] = getattr(self.config, f"{modality}_rates")
        project: nn.Module = getattr(self, f"{modality}_proj")[rates.index(rate)]
        if modality == "video" and self.config.video is not None and self.config.video.positions:
            states = states + sinusoids(*states.shape[1:]).to(states)
        mode, released = self.config.compression, self.config.released
        pooled, counts = pool_by_rate(states, lengths, rate, mode, whole_windows=released)
        return project(pooled.to(self.weight.dtype)), counts

    def rows(self, encoded: Encoded, texts: Sequence[Sequence[int]], rates: Rates) -> Rows:
        """Whole training sequences, padded on the right.

        Args:
            encoded: B items.
            texts: tokens of each text, without EOS.
            rates: one of `config.scales`.
        """
        place = self.weight.device
        ended = [torch.tensor([*text, self.config.eos_id], device=place) for text in texts]
        prefixes = [torch.cat(parts) for parts in zip(*self.blocks(encoded, rates), strict=True)]
        embeddings, mask = pad_rows([torch.cat([p, self.embed(text)]) for p, text in zip(prefixes, ended, strict=True)])
        if self.config.released:
            # The row of <pad> stands in padding; nothing sees it, since attention is causal.
            embeddings = torch.where(mask[..., None], embeddings, self.weight[-len(MARKERS) - 1])
        return Rows(embeddings, mask, label_rows([len(p) for p in prefixes], ended, self.config.bos_id))

    def logits(self, rows: Rows, rates: Rates) -> Tensor:
        """Predictions of the text and its end, one after another: (labels that count, vocabulary)."""
        with self.adapted(rates):
            # Padding is on the right, so the causal mask alone keeps it out of sight.
            hidden = self.language_model.model(inputs_embeds=rows.embeddings, use_cache=False)[0]
        labeled = rows.labels[:, 1:] != IGNORED
        return cast(Tensor, self.language_model.lm_head(hidden[:, :-1][labeled]))

    def loss(self, encoded: Encoded, texts: Sequence[Sequence[int]], rates: Rates) -> Tensor:
        """Mean cross entropy over the text tokens (and ends) of a batch at one pair of rates; see `rows`."""
        rows = self.rows(encoded, texts, rates)
        labels = rows.labels[:, 1:]
        return F.cross_entropy(self.logits(rows, rates).float(), labels[labels != IGNORED])

    @torch.no_grad()
    def prefill(self, encoded: Encoded, rates: Rates) -> PrefixCache:
        """Reads start and audio once, for all video rates of one audio rate; see `generate`.

        With adapters per scale (SS, MSS) the result holds for these rates alone.
        """
        heads, _ = self.blocks(encoded, rates)
        with self.adapted(rates):
            return prefill(self.language_model, heads)

    @torch.no_grad()
    def generate(
        self,
        encoded: Encoded,
        rates: Rates,
        limits: Sequence[int],
        *,
        prefix: PrefixCache | None = None,
        beams: int | None = None,
    ) -> list[Generation]:
        """Decodes a batch at one pair of rates.

        Args:
            encoded: B items.
            rates: one of `config.scales`.
            limits: most tokens for each item, its end included.
            prefix: what `prefill` made of the same items at the same audio rate.
            beams: width of the search, 1 for greedy; that of `config.decoding` if not given.
        """
        heads, tails = self.blocks(encoded, rates)
        rows = tails if prefix is not None else [torch.cat(parts) for parts in zip(heads, tails, strict=True)]
        decoding = self.config.decoding
        with self.adapted(rates):
            return generate(
                self.language_model,
                rows,
                limits,
                self.config.eos_id,
                beams=decoding.beams if beams is None else beams,
                prefix=prefix,
                forbidden=decoding.suppress_tokens,
            )

    def generate_all(
        self, encoded: Encoded, scales: Sequence[Rates], limits: Sequence[int], *, beams: int | None = None
    ) -> dict[Rates, list[Generation]]:
        """Decodes a batch at many pairs of rates; with one adapter for all, the audio of each rate is read once."""
        shared = self.config.lora.strategy == "MS"
        found: dict[Rates, list[Generation]] = {}
        for audio in dict.fromkeys(rates.audio for rates in scales):
            pairs = [rates for rates in scales if rates.audio == audio]
            prefix = self.prefill(encoded, pairs[0]) if shared and audio and len(pairs) > 1 else None
            found |= {rates: self.generate(encoded, rates, limits, prefix=prefix, beams=beams) for rates in pairs}
        return {rates: found[rates] for rates in scales}

    def adapted(self, rates: Rates) -> AbstractContextManager[None]:
        """The language model as it is at a pair of rates."""
        return self.lora.at(self.scale_of(rates))

    def scale_of(self, rates: Rates) -> int:
        """The index of a pair among the scales.

        Raises:
            ValueError: the model was not trained for it.
        """
        scales = self.config.scales
        if rates not in scales:
            raise ValueError(f"the model has no rates {rates}; it has {', '.join(map(str, scales))}")
        return scales.index(rates)

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """(n, H) embeddings of token ids."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.weight.device)
        return cast(Tensor, self.language_model.get_input_embeddings()(ids))

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text on its own, neither start nor end added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of tokens, without surrounding space."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _marker_rows(self) -> Sequence[Tensor]:
        """(1, H) of every marker."""
        rows = self.weight[-len(MARKERS) :] if self.markers is None else self.markers.to(self.weight.dtype)
        return [rows[i : i + 1] for i in range(len(MARKERS))]

    def _video_adapters(self) -> AbstractContextManager[None]:
        return nullcontext() if self.video_lora is None else self.video_lora.at(0)
