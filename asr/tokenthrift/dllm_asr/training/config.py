"""What a training of dLLM-ASR starts from, what it trains and what it shows, as plain data.

Source: dLLM-ASR (arXiv 2601.17902) for the fully masked share; its other settings are not published. Every field is a
key of a recipe (`model.init_args.config`) and a flag of `tokenthrift fit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenthrift.config import ConfigError, check_within
from tokenthrift.dllm_asr.config import AdapterConfig, BackboneConfig, DraftConfig

__all__ = ["ExampleConfig", "TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """What the denoiser is shown, see `examples`."""

    from_draft_prob: float = 0.5
    """Probability that a row starts from its draft, if it has one; the others follow the published forward process."""
    partially_decoded_prob: float = 0.5
    """Probability that such a row is shown as it looks some rounds later."""
    fully_masked_prob: float = 0.2
    """Probability that a row of the forward process is masked from end to end."""
    substitute_prob: float = 0.03
    """Probability that a visible token is replaced by a random one, so that visible tokens are doubted."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_within(f"examples.{name}", value, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The model to train, and how."""

    whisper: str = "openai/whisper-tiny.en"
    """Transformers checkpoint of an English Whisper, folder or Hub id."""
    language_model: str | None = None
    """Checkpoint to denoise with, cut to a small vocabulary and trained as a whole (BERT, ModernBERT, Llama, Qwen2,
    Qwen3, LLaDA, Dream); Whisper's own decoder if not given."""
    backbone: BackboneConfig | None = None
    """Published language model in place of it, by family and source, with its whole vocabulary; frozen, or with
    adapters (`lora`)."""
    encoder: Literal["whisper", "step_audio"] = "whisper"
    """What `whisper` names: a Whisper, or Step-Audio-2-mini. The latter needs a `backbone`."""
    copy_encoder: bool = True
    """Copy the encoder's weights into the model's file; otherwise its folder names their source. With a `backbone`."""
    copy_language_model: bool = False
    """Train all weights of `backbone` and copy them into the model's file."""
    vocab_size: int = 5000
    """Most tokens to keep of its vocabulary."""
    max_position_embeddings: int = 256
    """Longest response of Whisper's decoder; other language models keep their own."""
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(stride=1))
    """Rates of the memory; a stride of 1 leaves the convolution out."""
    draft: DraftConfig = field(default_factory=DraftConfig)
    """Sizes of the CTC head."""
    start_from: list[str] = field(default_factory=list)
    """Training checkpoints or model folders to begin with. Each gives the parts that it trained, later ones win. The
    schedule starts anew."""
    train_draft: bool = True
    """Train the CTC head."""
    train_denoiser: bool = True
    """Train adapter and language model."""
    draft_learning_rate: float = 1e-3
    """Learning rate of the CTC head."""
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    """What the denoiser is shown."""
    visible_weight: float = 0.1
    """Weight of the cross-entropy of visible tokens."""
    time_mask_prob: float = 0.0
    """Share of the encoder states that are set to zero, in spans of up to 0.3 s."""

    def __post_init__(self) -> None:
        if self.backbone is not None and self.language_model is not None:
            raise ConfigError("language_model and backbone both name a language model; give one of them")
        if self.backbone is not None and self.backbone.source is None:
            raise ConfigError("backbone.source names the published language model to begin with")
        if self.backbone is None and (self.encoder != "whisper" or not self.copy_encoder or self.copy_language_model):
            raise ConfigError("encoder, copy_encoder and copy_language_model are settings of a model around a backbone")
        check_within("visible_weight", self.visible_weight, 0.0, 10.0)
        check_within("time_mask_prob", self.time_mask_prob, 0.0, 0.9)
