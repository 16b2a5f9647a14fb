"""What a dLLM-ASR model is made of and how it decodes, as plain data.

Source: dLLM-ASR (arXiv 2601.17902). The paper's sizes (Whisper-large-v3, LLaDA-8B) are reached with other numbers here;
its threshold of 0.9 is the default. Draft settings are ours: the paper does not say how large the CTC branch is nor how
its draft meets the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenthrift.backbones.shape import BackboneShape
from tokenthrift.config import ConfigError, check_within

__all__ = [
    "SOURCE_FAMILIES",
    "AdapterConfig",
    "BackboneConfig",
    "DecodeConfig",
    "DllmAsrConfig",
    "DraftConfig",
    "DraftUse",
    "EncoderConfig",
    "LoraConfig",
    "SamplerName",
    "upgrade_version_1",
]


DraftUse = Literal["confident", "length", "both", "none"]
SamplerName = Literal["prior_guided", "llada", "fast_dllm", "dream", "entropy_bound", "daedal", "diffuspec"]

SOURCE_FAMILIES = ("llada", "dream", "a2d", "fast_dllm_v2", "modernbert", "bert")
"""Families whose published weights `backbones.families` reads."""


_BACKBONE_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen Whisper encoder; the defaults are those of tiny.en."""

    hidden_size: int = 384
    """Width of its states."""
    num_hidden_layers: int = 4
    """Transformer layers."""
    num_attention_heads: int = 6
    """Heads of each layer."""
    intermediate_size: int = 1536
    """Width of the feed-forward."""
    num_mel_bins: int = 80
    """Mel bins of the spectrogram: 80, or 128 for large-v3."""
    kind: Literal["whisper", "step_audio"] = "whisper"
    """"step_audio" is that of Step-Audio-2-mini, which the released dLLM-ASR reads: a Whisper encoder without the norm
    at its end; what comes after it is part of the adapter."""
    source: str | None = None
    """Folder or Hub id that holds its weights; None where they lie in this model's own file."""
    trailing_silence: float = 0.0
    """Seconds of silence that the encoder reads after a recording. Whisper was trained on 30 s always and reads speech
    that ends at once badly. The states of the silence are not kept."""

    def __post_init__(self) -> None:
        _check_sizes("encoder", self, hidden_size=4096, num_hidden_layers=64, num_attention_heads=64)
        check_within("encoder.intermediate_size", self.intermediate_size, 1, 16_384)
        check_within("encoder.num_mel_bins", self.num_mel_bins, 1, 128)
        check_within("encoder.trailing_silence", self.trailing_silence, 0.0, 30.0)
        if self.hidden_size % 2:
            raise ConfigError(f"encoder.hidden_size {self.hidden_size} must be even")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """From encoder states (50 a second) to the memory of the language model."""

    pool: int = 2
    """Average pooling of encoder states; 2 gives 25 a second, as in the paper."""
    stride: int = 2
    """Stride of the convolution after it; 2 gives 12.5 a second, 1 leaves the convolution and the projection out."""
    pools: tuple[int, ...] = ()
    """Every pooling that the model was trained with, `pool` among them, in ascending order: a token budget chooses one.
    Empty where there is only `pool`, and no budget is taken."""

    def __post_init__(self) -> None:
        for pool in (self.pool, *self.pools):
            check_within("adapter.pool", pool, 1, 8)
        check_within("adapter.stride", self.stride, 1, 8)
        if self.pools and (list(self.pools) != sorted(set(self.pools)) or self.pool not in self.pools):
            raise ConfigError(f"adapter.pools {self.pools} must ascend and hold adapter.pool {self.pool}")

    @property
    def trained_pools(self) -> tuple[int, ...]:
        """Every pooling that there is."""
        return self.pools or (self.pool,)


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The CTC head over characters, on the same encoder."""

    hidden_size: int = 256
    """Width of its layers."""
    num_hidden_layers: int = 3
    """Transformer layers."""
    num_attention_heads: int = 4
    """Heads of each layer."""
    intermediate_size: int = 1024
    """Width of the feed-forward."""

    def __post_init__(self) -> None:
        _check_sizes("draft", self, hidden_size=4096, num_hidden_layers=32, num_attention_heads=64)
        check_within("draft.intermediate_size", self.intermediate_size, 1, 16_384)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (PEFT's) in a language model whose own weights stay as they are."""

    rank: int = 16
    """Rank of each adapter."""
    alpha: float = 32.0
    """Scale; an adapter's output counts `alpha / rank`."""
    dropout: float = 0.05
    """Share of an adapter's input that is left out in training."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Projections; LLaDA's own names (`attn_out`, `ff_proj`, `ff_out` of its blocks) are understood for LLaDA."""

    def __post_init__(self) -> None:
        check_within("lora.rank", self.rank, 1, 4096)
        check_within("lora.alpha", self.alpha, 1e-6, 65_536)
        check_within("lora.dropout", self.dropout, 0.0, 0.99)
        if not self.targets:
            raise ConfigError("lora.targets names no projection; leave lora out to train none")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The masked-diffusion language model.

    A published one is named by its family and its source, which is all that has to be said:
    `{family: llada, source: GSAI-ML/LLaDA-8B-Instruct}`. Its sizes are read from there, and its weights are not copied
    into this model's file.
    """

    family: Literal[
        "whisper", "bert", "modernbert", "llama", "qwen2", "qwen3", "llada", "dream", "a2d", "fast_dllm_v2"
    ] = "whisper"
    """"whisper" cross-attends to the memory; the others read it as a prefix. Those of `source` are llada, dream, a2d (a
    Qwen2, Qwen3 or Llama turned bidirectional), fast_dllm_v2, modernbert and bert."""
    source: str | None = None
    """Folder or Hub id of published weights; None where they lie in this model's own file."""
    language_model: BackboneShape | None = None
    """What the prefix model is made of, grouped key and value heads included; the five sizes below are then its own.
    None has it read from `source`, or made of those sizes."""
    lora: LoraConfig | None = None
    """Adapters in it, which are in this model's file."""
    prompt: str | None = None
    """Text around the memory, which stands at `{audio}`; None has the chat template of the family. Only with a whole
    vocabulary."""
    mask_id: int | None = None
    """Token of MASK where the source names none, as a plain Qwen2, Qwen3 or Llama does not: a row of its embedding that
    no text has."""
    end_id: int | None = None
    """Token that ends a text, where the whole vocabulary of a published model is used; None where the tokenizer has the
    four special tokens of a cut vocabulary."""
    delete_id: int | None = None
    """Token of a slot that leaves no text, of a whole vocabulary."""
    hidden_size: int = 384
    """Width of its layers."""
    num_hidden_layers: int = 4
    """Transformer layers."""
    num_attention_heads: int = 6
    """Heads of each layer."""
    intermediate_size: int = 1536
    """Width of the feed-forward."""
    max_position_embeddings: int = 256
    """Longest input: start tokens and response, and for prefix models the memory too."""

    def __post_init__(self) -> None:
        if self.source is not None and self.family not in SOURCE_FAMILIES:
            raise ConfigError(
                f"backbone.family {self.family!r} has no published weights; backbone.source needs one of "
                f"{', '.join(SOURCE_FAMILIES)}"
            )
        if self.source is None and self.language_model is None and self.family in SOURCE_FAMILIES[:4]:
            raise ConfigError(f"backbone.family {self.family!r} needs backbone.source, a folder or Hub id")
        if self.prompt is not None and self.prompt.count("{audio}") != 1:
            raise ConfigError(f"backbone.prompt {self.prompt!r} must have {{audio}} once, where the memory stands")
        if (shape := self.language_model) is not None:
            if self.mask_id not in (None, shape.mask_id):
                raise ConfigError(f"backbone.mask_id {self.mask_id} is not language_model.mask_id {shape.mask_id}")
            for name in (*_BACKBONE_SIZES, "max_position_embeddings"):
                object.__setattr__(self, name, getattr(shape, name))
            return
        _check_sizes("backbone", self, hidden_size=8192, num_hidden_layers=128, num_attention_heads=128)
        check_within("backbone.intermediate_size", self.intermediate_size, 1, 65_536)
        check_within("backbone.max_position_embeddings", self.max_position_embeddings, 16, 16_384)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the model decodes unless the call says otherwise."""

    confidence_threshold: float = 0.9
    """Probability from which a token is committed in a round."""
    max_rounds: int | None = None
    """Most rounds; the last one commits every slot that is still open."""
    draft: DraftUse = "confident"
    """What is used of the CTC draft: "confident" keeps its confident words and opens slots for the others, "length"
    opens slots for all, with their tokens as hints; "none" guesses the number of slots from the duration. "both"
    denoises the first two side by side, in the same rounds, and keeps the text to which the CTC head gives the higher
    likelihood."""
    draft_threshold: float = 0.9
    """CTC posterior below which a word of the draft is left to the language model."""
    extra_slots_ratio: float = 0.3
    """Extra slots of a word that is left to the language model, as a share of its draft tokens, on top of one. Slots
    that are not needed are deleted."""
    extra_slots_at_end: int = 2
    """Extra slots after the last word."""
    verify_threshold: float = 0.05
    """Draft tokens to which the language model gives less than this in round 1 are opened again; 0 trusts the draft."""
    verify_committed: bool = False
    """Verify committed tokens too, after every round. A text then ends with a round that changes nothing, or at the
    most rounds. Needs `verify_threshold`."""
    prune: Literal["every", "first", "never"] = "every"
    """When a committed end of text shortens the response: after every round, after the first as published, or never."""
    slots_per_second: float = 5.0
    """Slots for each second of audio where the draft gives no length."""
    sampler: SamplerName = "prior_guided"
    """What decodes: "prior_guided" is dLLM-ASR's own; the others are those of `backbones.samplers`, which take the
    threshold alone from here, where they have one. "diffuspec" takes the best path through one pass, a draft for
    `certify_draft="denoised"`."""
    draft_entropy: float = 0.0
    """Nats; a recording whose draft has no frame of more entropy is not read by the language model. 0 reads all."""
    n_best: int = 1
    """Texts for each recording, from that many drafts, all but the first drawn; the one of minimum Bayes risk stays.
    Refused beside the certified draft of the CTC head, as nothing is denoised there."""
    hotword_boost: float = 4.0
    """Nats that a token of a hotword gains in an open slot."""
    certify: Literal["ar"] | None = None
    """"ar" verifies drafts by the left-to-right reading of the language model, whose greedy text is written."""
    certify_draft: Literal["ctc", "denoised", "both"] = "ctc"
    """Which drafts are verified: that of the CTC head, which costs no pass, the denoised text, or both side by side."""
    certify_rejection_prob: float = 1.0
    """A verifying pass reads a draft up to where one of its tokens is rejected with this probability, as the last pass
    or their confidences say (SpecDec++); 1 reads it to the end."""
    active_halo: int | None = None
    """Slots on each side of an open or changed one that a round of denoising reads, beside kept keys of the others;
    None reads all slots in every round, which is exact. Only for language models that read the memory as a prefix."""
    active_refresh: int | None = None
    """With `active_halo`, rounds after which all slots are read again; 1 is exact, None reads all in the first only.
    All are read again too where a text enters a batch of `max_rows`: an approximate text may then depend on others."""
    max_rows: int = 16
    """Most texts that the language model reads side by side; one that is done leaves, and the next one enters."""

    def __post_init__(self) -> None:
        check_within("decode.confidence_threshold", self.confidence_threshold, 1e-6, 1.0)
        if self.max_rounds is not None:
            check_within("decode.max_rounds", self.max_rounds, 1, 1024)
        check_within("decode.draft_threshold", self.draft_threshold, 0.0, 1.0)
        check_within("decode.extra_slots_ratio", self.extra_slots_ratio, 0.0, 4.0)
        check_within("decode.extra_slots_at_end", self.extra_slots_at_end, 0, 64)
        check_within("decode.verify_threshold", self.verify_threshold, 0.0, 1.0)
        if self.verify_committed and not self.verify_threshold:
            raise ConfigError("decode.verify_committed needs a decode.verify_threshold above 0")
        check_within("decode.slots_per_second", self.slots_per_second, 0.1, 50.0)
        check_within("decode.draft_entropy", self.draft_entropy, 0.0, 100.0)
        check_within("decode.n_best", self.n_best, 1, 256)
        check_within("decode.hotword_boost", self.hotword_boost, 0.0, 100.0)
        check_within("decode.certify_rejection_prob", self.certify_rejection_prob, 1e-6, 1.0)
        check_within("decode.max_rows", self.max_rows, 1, 4096)
        if self.active_halo is not None:
            check_within("decode.active_halo", self.active_halo, 0, 4096)
        if self.active_refresh is not None:
            if self.active_halo is None:
                raise ConfigError(
                    "decode.active_refresh needs decode.active_halo; without a halo every round reads all"
                )
            check_within("decode.active_refresh", self.active_refresh, 1, 1024)


@dataclass(frozen=True, kw_only=True)
class DllmAsrConfig:
    """A whole model."""

    vocab_size: int
    """Tokens of the language model, the four special ones included."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The frozen encoder."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Encoder states to the memory of the language model."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    """The CTC head."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The language model."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Decoding settings."""
    punctuation: int | None = None
    """Width of the head for casing and punctuation; None writes lower-case words."""

    def __post_init__(self) -> None:
        check_within("vocab_size", self.vocab_size, 8, 300_000)
        if self.punctuation is not None:
            check_within("punctuation", self.punctuation, 1, 8192)
        if self.encoder.kind == "step_audio" and (self.adapter.trained_pools, self.adapter.stride) != ((2,), 2):
            raise ConfigError("Step-Audio has one rate, 12.5 a second: adapter.pool 2 and adapter.stride 2")
        known = self.backbone.source is None or self.backbone.language_model is not None
        if self.adapter.stride == 1 and known and self.encoder.hidden_size != self.backbone.hidden_size:
            raise ConfigError(
                f"without a convolution (adapter.stride 1) the backbone reads encoder states as they are: "
                f"backbone.hidden_size {self.backbone.hidden_size} must equal "
                f"encoder.hidden_size {self.encoder.hidden_size}"
            )


_SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}
_VERSION_1: dict[str, dict[str, str]] = {
    "encoder": {**_SIZES, "bins": "num_mel_bins", "tail": "trailing_silence"},
    "draft": _SIZES,
    "backbone": {**_SIZES, "positions": "max_position_embeddings"},
    "decode": {
        "slack": "extra_slots_ratio",
        "margin": "extra_slots_at_end",
        "verify": "verify_threshold",
        "recheck": "verify_committed",
        "tokens_per_second": "slots_per_second",
    },
}


def upgrade_version_1(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` of format_version 1 under today's names; unknown ones are left as they are."""

    def renamed(part: object, names: Mapping[str, str]) -> object:
        return {names.get(name, name): value for name, value in part.items()} if isinstance(part, Mapping) else part

    return {name: renamed(part, _VERSION_1.get(name, {})) for name, part in fields.items()}


def _check_sizes(part: str, config: EncoderConfig | DraftConfig | BackboneConfig, **highest: int) -> None:
    for name, high in highest.items():
        check_within(f"{part}.{name}", getattr(config, name), 1, high)
    if config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        raise ConfigError(f"{part}.hidden_size {config.hidden_size} must be a multiple of num_attention_heads {heads}")
