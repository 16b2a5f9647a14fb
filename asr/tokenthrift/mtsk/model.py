"""Llama-MTSK: frozen Whisper and AV-HuBERT, tokens at any trained rate, a frozen language model with adapters.

Source: Llama-MTSK (arXiv 2503.06362), section 3. Speech and lips are encoded once; at each call a pair of rates says
how many states make a token, and picks the projectors and adapters that belong to it.

Differs from the published code, unless `compat="released"` asks for it: an item's result never depends on its batch
(tokens by its own length, no padding read in encoders or language model), encoders never leave evaluation mode,
adapters start at zero, the markers are trained, Whisper hears the waveform at its own level over the audio that is
there, and the last states of an utterance are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeBudget, TokenBudget
from tokenthrift.hub import HubModel
from tokenthrift.mtsk import frozen
from tokenthrift.mtsk.avhubert import FRAME_RATE, AVHubert, normalise
from tokenthrift.mtsk.compression import compress
from tokenthrift.mtsk.config import MTSKConfig
from tokenthrift.mtsk.decoding import Heard, Written, listen, write
from tokenthrift.mtsk.language_model import build, exact_positions
from tokenthrift.mtsk.lora import Lora, attentions
from tokenthrift.mtsk.projectors import projectors
from tokenthrift.mtsk.rates import SUPPORT, Price, Rates
from tokenthrift.mtsk.released import released_lengths, released_mels
from tokenthrift.mtsk.sequence import IGNORED, MARKERS, PROMPTS, Encoded, Rows, label_rows, pad_rows
from tokenthrift.mtsk.transcribing import ceilings_of, items_of, plan_item, transcribe_items
from tokenthrift.transcript import Transcript
from tokenthrift.whisper import SAMPLE_RATE, WhisperEncoder, log_mel, pad_mels, states_of

__all__ = ["LlamaMTSK"]

VIDEO_LORA_SCALE = 2.0


class LlamaMTSK(HubModel):
    """Speech, lips or both to text, at a price in tokens that the caller sets.

    Args:
        config: sizes, rates, strategy.
        tokenizer: of the language model, in the format of the tokenizers library.
        home: the model's folder, against which relative names of frozen parts are read first.
    """

    system: ClassVar[str] = "mtsk"
    config_class: ClassVar[type] = MTSKConfig
    asset_files: ClassVar[tuple[str, ...]] = ("tokenizer.json",)
    config: MTSKConfig
    support: ClassVar[BudgetSupport] = SUPPORT
    sample_rate = SAMPLE_RATE
    frame_rate = FRAME_RATE
    max_seconds = 30.0

    def __init__(self, config: MTSKConfig, tokenizer: Tokenizer, home: Path | None = None) -> None:
        super().__init__(config)
        self.tokenizer, self.home = tokenizer, home
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
        shape = (config.projector_width, lm.width, config.compression)
        self.audio_encoder: WhisperEncoder | None = None
        self.video_encoder: AVHubert | None = None
        self.video_lora: Lora | None = None
        if audio is not None:
            self.audio_encoder = WhisperEncoder(audio.width, audio.layers, audio.heads, audio.ffn, audio.bins)
            self.audio_encoder.requires_grad_(False)
            self.audio_proj = projectors(config.audio_rates, audio.width, *shape, norm=config.projector_norm)
        if video is not None:
            self.video_encoder = AVHubert(video.width, video.layers, video.heads, video.ffn, video.channels)
            self.video_encoder.requires_grad_(video.trained)
            # The audio half of the encoder is zeros here, so its input layer never learns.
            self.video_encoder.feature_extractor_audio.requires_grad_(False)
            if video.lora:
                self.video_lora = Lora(attentions(self.video_encoder.encoder), 1, "MS", video.lora, VIDEO_LORA_SCALE)
            self.video_proj = projectors(config.video_rates, video.width, *shape, norm=config.projector_norm)
        # The authors' markers are rows of the language model's own table.
        self.markers = None if config.released else nn.Parameter(torch.randn(len(MARKERS), lm.width) * 0.02)
        self.register_state_dict_post_hook(frozen.forget)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(frozen.not_missing)  # type: ignore[no-untyped-call]
        self.train(self.training)

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """The tokenizer, and where the model lies."""
        return {"tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")), "home": folder}

    def write_assets(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save(str(folder / "tokenizer.json"))

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Loads a model and the frozen parts that it names; see `HubModel.from_pretrained`."""
        model = super().from_pretrained(source, **options)
        kept = ("cache_dir", "token", "local_files_only")
        frozen.fill(model, **{name: options[name] for name in kept if name in options})
        return model

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of what is trained; frozen parts stay in evaluation mode, or batch norm would drift."""
        super().train(mode)
        for part in frozen.untrained(self):
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
            video: (T, H, W) each, grey mouth crops at 25 frames a second, uint8 or in [0, 1]; None for audio alone.
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
            raise ValueError("this model does not listen; give it video alone")
        place, bins = self.audio_encoder.conv1.weight, self.config.audio.bins
        samples = [row.to(place.device) for row in audio]
        if not self.config.released:
            mels, lengths = pad_mels([log_mel(row, bins) for row in samples])
            return self.audio_encoder(mels.to(place.dtype), lengths), lengths
        mels, whole = pad_mels(released_mels(samples, bins))
        lengths = released_lengths([len(row) for row in samples], place.device)
        return self.audio_encoder(mels.to(place.dtype), whole)[:, : int(lengths[0])], lengths

    def encode_video(self, video: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """AV-HuBERT states (B, T, D) and their lengths (B,); see `encode`. Carries gradient where it is trained."""
        if self.video_encoder is None or self.config.video is None:
            raise ValueError("this model does not read lips; give it audio alone")
        place, crop = self.video_encoder.post_extract_proj.weight, self.config.video.crop
        frames = [normalise(row.to(place.device), crop).to(place.dtype) for row in video]
        lengths = torch.tensor([len(row) for row in frames], device=place.device)
        padded = pad_sequence(frames, batch_first=True)
        if self.config.released:
            lengths = torch.full_like(lengths, padded.shape[1])
        trained = self.config.video.trained or self.video_lora is not None
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()), self._video_adapters():
            return self.video_encoder(padded, lengths), lengths

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
            raise ValueError(f"rate {rate} of {modality} was asked for, but there is no {modality}")
        rates: tuple[int, ...] = getattr(self.config, f"{modality}_rates")
        project: nn.Module = getattr(self, f"{modality}_proj")[rates.index(rate)]
        made, counts = compress(states, lengths, rate, self.config.compression, whole_windows=self.config.released)
        return project(made.to(self.weight.dtype)), counts

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
        embeddings, mask = pad_rows(
            [torch.cat([p, self.embed(text)]) for p, text in zip(prefixes, ended, strict=True)], "right"
        )
        if self.config.released:
            # The row of <pad> stands in padding; nothing sees it, since attention is causal.
            embeddings = torch.where(mask[..., None], embeddings, self.weight[-len(MARKERS) - 1])
        return Rows(embeddings, mask, label_rows([len(p) for p in prefixes], ended, self.config.bos_id))

    def logits(self, rows: Rows, rates: Rates) -> Tensor:
        """Predictions of the text and its end, one after another: (labels that count, vocabulary)."""
        with self.adapted(rates):
            # Padding is on the right, so the causal mask alone keeps it out of sight.
            hidden = self.language_model.model(inputs_embeds=rows.embeddings, use_cache=False)[0]
        wanted = rows.labels[:, 1:] != IGNORED
        return cast(Tensor, self.language_model.lm_head(hidden[:, :-1][wanted]))

    def loss(self, encoded: Encoded, texts: Sequence[Sequence[int]], rates: Rates) -> Tensor:
        """Mean cross entropy over the text tokens (and ends) of a batch at one pair of rates; see `rows`."""
        rows = self.rows(encoded, texts, rates)
        labels = rows.labels[:, 1:]
        return F.cross_entropy(self.logits(rows, rates).float(), labels[labels != IGNORED])

    @torch.no_grad()
    def listen(self, encoded: Encoded, rates: Rates) -> Heard | None:
        """Reads start and audio once, for all video rates of one audio rate; see `write`.

        With adapters per scale (SS, MSS) the result holds for these rates alone.
        """
        heads, _ = self.blocks(encoded, rates)
        with self.adapted(rates):
            return listen(self.language_model, heads)

    @torch.no_grad()
    def write(
        self, encoded: Encoded, rates: Rates, limits: Sequence[int], *, heard: Heard | None = None
    ) -> list[Written]:
        """Decodes a batch at one pair of rates.

        Args:
            encoded: B items.
            rates: one of `config.scales`.
            limits: most tokens for each item, its end included.
            heard: what `listen` made of the same items at the same audio rate.
        """
        heads, tails = self.blocks(encoded, rates)
        if heard is None:
            tails = [torch.cat(parts) for parts in zip(heads, tails, strict=True)]
        with self.adapted(rates):
            settings = self.config.decode
            return write(self.language_model, tails, limits, self.config.eos_id, beams=settings.beams, heard=heard)

    def write_all(self, encoded: Encoded, scales: Sequence[Rates], limits: Sequence[int]) -> dict[Rates, list[Written]]:
        """Decodes a batch at many pairs of rates; with one adapter for all, every audio rate is heard once."""
        shared = self.config.lora.strategy == "MS"
        found: dict[Rates, list[Written]] = {}
        for audio in dict.fromkeys(rates.audio for rates in scales):
            pairs = [rates for rates in scales if rates.audio == audio]
            heard = self.listen(encoded, pairs[0]) if shared and audio and len(pairs) > 1 else None
            found |= {rates: self.write(encoded, rates, limits, heard=heard) for rates in pairs}
        return {rates: found[rates] for rates in scales}

    def plan(
        self,
        samples: Sequence[int | None],
        frames: Sequence[int | None],
        budget: BudgetLike | Rates | None = None,
        *,
        coarse_to_fine: bool = False,
    ) -> list[Price]:
        """What items will cost: rates and tokens, known before anything is computed.

        Args:
            samples: of each audio at 16 kHz, None without audio.
            frames: of each video at 25 frames a second, None without video.
            budget: as in `transcribe`.
            coarse_to_fine: the price is that of both passes, a bound for what is used.

        Raises:
            BudgetError, ValueError: as `transcribe`.
        """
        ceilings = ceilings_of(budget)
        counts = [(0 if n is None else states_of(n), t or 0) for n, t in zip(samples, frames, strict=True)]
        return [plan_item(self.config, n, t, ceilings, coarse_to_fine=coarse_to_fine)[1] for n, t in counts]

    def transcribe(
        self,
        audio: Sequence[Tensor | None] | None = None,
        video: Sequence[Tensor | None] | None = None,
        budget: BudgetLike | Rates | None = None,
        *,
        decode: DecodeBudget | None = None,
        coarse_to_fine: bool = False,
        noise_aware: bool = False,
    ) -> list[Transcript]:
        """Transcribes recordings; the result of each is that of the recording alone.

        Args:
            audio: (samples,) each, mono at 16 kHz in [-1, 1], at most 30 s; None where there is none.
            video: (T, H, W) each, grey mouth crops at 25 frames a second, uint8 or in [0, 1]; None where there is none.
            budget: ceilings in tokens for each item, or the rates; without, whatever writes best. Tokens are those of
                audio and video; markers and prompt add about a dozen.
            decode: ceilings for each text. `max_rounds` and `confidence_threshold` speak about `coarse_to_fine`.
            coarse_to_fine: decode at the cheapest rates first, and at those of the budget only what is unsure. The
                budget then holds for both passes together.
            noise_aware: choose by the lines of the model's table that fit the noise of the item's audio.

        Raises:
            BudgetError: a budget that cannot be honoured, with the nearest that can.
            ValueError: an item that the encoders cannot read, or streams that the model was not trained for.
        """
        items = items_of(audio, video)
        return transcribe_items(
            self, items, ceilings_of(budget), decode, coarse_to_fine=coarse_to_fine, noise_aware=noise_aware
        )

    def accepts(self, *, audio: bool, video: bool) -> bool:
        """Whether the model has rates for items with these streams, or for some of them."""
        return any((audio or not rates.audio) and (video or not rates.video) for rates in self.config.scales)

    def check_price(self, samples: int, frames: int, budget: TokenBudget) -> None:
        """Raises BudgetError where an item cannot have what it costs; 0 samples or frames are none."""
        self.plan([samples or None], [frames or None], budget)

    def read_lips(self, path: Path) -> Tensor | None:
        """The mouth crops in a file, or None where the model does not look or no whole video can be read from the file.

        Raises:
            FaceError: there are pictures, and no face in them.
        """
        if self.config.video is None:
            return None
        from tokenthrift.media.video import VideoError
        from tokenthrift.mtsk.lips import read_lips

        try:
            return read_lips(path).pixels
        except VideoError:
            return None

    def adapted(self, rates: Rates) -> AbstractContextManager[None]:
        """The language model as it is at a pair of rates."""
        return self.lora.at(self.scale_of(rates))

    def scale_of(self, rates: Rates) -> int:
        """The place of a pair among the scales.

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
