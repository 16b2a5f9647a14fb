"""VideoAnswerer: a small video language model that reads a clip as native or reduced tokens and answers in one word.

The shape of the paper's system (VQToken, arXiv 2503.16980, section 3) at a size that one core can train: a ViT that
sees one frame at a time (timm's architecture), a projection, the reduction of all tokens of the clip, and a Llama
(transformers) that reads the remaining tokens as a prefix of the question. It is trained on the synthetic questions of
`questions.py` only and knows no other words.

What differs from LLaVA-OneVision, on which the paper builds: the last coordinates of a token encode its frame, row and
column, so means of tokens keep where and when; a token stands at the position of its first frame, and the question
starts at the first position after the clip, so positions do not depend on how many tokens are kept; there is no newline
row; a two-layer perceptron reads tokens and how many native tokens each stands for. Any `TokenReducer` can reduce the
tokens, and the same weights read them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokenthrift.auto.processing import video_files
from tokenthrift.backbones.causal import PrefixCache, prefill, score_next
from tokenthrift.budget import BudgetLike, BudgetSupport, ItemSize, NativeCost, SizeLike, TokenUsage, sizes_of
from tokenthrift.config import ConfigError, check_within
from tokenthrift.extras import require
from tokenthrift.hub import HubModel
from tokenthrift.padding import unpad_rows
from tokenthrift.reducers.base import TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig, upgrade_vqtoken_config
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.synthetic.questions import WORDS, encode_text

__all__ = ["Answer", "AnswererConfig", "VideoAnswerer", "position_code"]

_WAVES = 4
POSITION_DIM = 3 * 2 * _WAVES


_VERSION_1: Final = {
    "frames": "num_frames",
    "side": "image_size",
    "patch": "patch_size",
    "encoder_width": "encoder_hidden_size",
    "encoder_layers": "encoder_num_hidden_layers",
    "encoder_heads": "encoder_num_attention_heads",
    "token_width": "token_dim",
    "place_weight": "position_weight",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "words": "vocabulary",
}


@dataclass(frozen=True, kw_only=True)
class AnswererConfig:
    """A whole model; the defaults are those of the shipped one."""

    num_frames: int = 8
    """Frames of a clip."""
    image_size: int = 64
    """Pixels along a side of a square frame."""
    patch_size: int = 8
    """Pixels along a side of a patch."""
    frames_per_second: float = 4.0
    """Of the clips it was trained on; `tokens_per_second` counts by it."""
    encoder_hidden_size: int = 128
    """Width of the ViT."""
    encoder_num_hidden_layers: int = 4
    """Layers of the ViT."""
    encoder_num_attention_heads: int = 4
    """Attention heads of the ViT."""
    token_dim: int = 192
    """Width of native tokens: what the encoder says, and 24 coordinates of the position in the clip."""
    position_weight: float = 0.3
    """Length of the position coordinates; the rest of a token has a length of about one."""
    hidden_size: int = 192
    """Width of the language model."""
    num_hidden_layers: int = 3
    """Layers of the language model."""
    num_attention_heads: int = 3
    """Attention heads of the language model."""
    intermediate_size: int = 512
    """Width inside the feed-forward parts of the language model."""
    vocabulary: list[str] = field(default_factory=lambda: list(WORDS))
    """Words of questions and answers; always those of this release."""
    vqtoken: VQTokenConfig = field(
        default_factory=lambda: VQTokenConfig(
            attention=AttentionConfig(hidden_size=192, num_attention_heads=4, intermediate_size=384, num_patches=64)
        )
    )
    """The model's own reducer."""

    def __post_init__(self) -> None:
        ranges = {"num_frames": 256, "image_size": 512, "patch_size": 64, "token_dim": 4096, "hidden_size": 4096}
        ranges |= {"encoder_hidden_size": 2048, "encoder_num_hidden_layers": 48, "encoder_num_attention_heads": 64}
        ranges |= {"num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 16_384}
        for name, high in ranges.items():
            check_within(name, getattr(self, name), 1, high)
        for name in ("position_weight", "frames_per_second"):
            if not 0 < getattr(self, name) <= 1000:
                raise ConfigError(f"{name} must be above 0 and at most 1000, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.encoder_hidden_size % self.encoder_num_attention_heads:
            raise ConfigError("encoder_hidden_size must be a multiple of encoder_num_attention_heads")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError("hidden_size must be a multiple of twice num_attention_heads")
        if self.token_dim <= POSITION_DIM:
            raise ConfigError(f"token_dim {self.token_dim} must be above {POSITION_DIM}, the coordinates of a position")
        if self.vocabulary != list(WORDS):
            raise ConfigError("vocabulary: the model has another vocabulary than the questions of this release")
        attention = self.vqtoken.attention
        if attention is not None and attention.hidden_size != self.token_dim:
            raise ConfigError(
                f"vqtoken.attention.hidden_size {attention.hidden_size} must be token_dim {self.token_dim}"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip's native tokens."""
        return self.num_frames, self.image_size // self.patch_size, self.image_size // self.patch_size


class Answer(NamedTuple):
    """A word, the probability that the model gives it, and the token usage of the clip."""

    word: str
    confidence: float
    usage: TokenUsage


def position_code(grid: tuple[int, int, int]) -> Tensor:
    """(T * H * W, 24): sines and cosines of frame, row and column at four wavelengths; every row has length one.

    The longest wave is twice the clip, so its mean over a cluster still gives the mean position.
    """
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3, 1)
    angles = positions * (math.pi / 2) * 2.0 ** torch.arange(_WAVES)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1) / math.sqrt(3 * _WAVES)


class VideoAnswerer(HubModel):
    """Answers questions about clips; any reducer can stand between its encoder and its language model.

    A batch of clips is (B, num_frames, 3, image_size, image_size), uint8 or floating point in [0, 1]. All clips have
    the number of frames and the size of the configuration. The model is in evaluation mode until `train()` is called.

    Args:
        config: sizes.
    """

    system: ClassVar[str] = "vqtoken_answerer"
    config_class: ClassVar[type] = AnswererConfig
    config: AnswererConfig

    def __init__(self, config: AnswererConfig | None = None) -> None:
        super().__init__(config or AnswererConfig())
        c = self.config
        self.encoder = require("timm.models.vision_transformer").VisionTransformer(
            img_size=c.image_size,
            patch_size=c.patch_size,
            embed_dim=c.encoder_hidden_size,
            depth=c.encoder_num_hidden_layers,
            num_heads=c.encoder_num_attention_heads,
            mlp_ratio=2.0,
            class_token=False,
            global_pool="",
            num_classes=0,
        )
        self.project = nn.Linear(c.encoder_hidden_size, c.token_dim - POSITION_DIM)
        self.vqtoken = VQToken(c.vqtoken)
        self.read = nn.Sequential(
            nn.Linear(c.token_dim + 1, 2 * c.hidden_size),
            nn.GELU(),
            nn.Linear(2 * c.hidden_size, c.hidden_size),
            # Without it, states grow until the layers of the language model add nothing to them.
            nn.LayerNorm(c.hidden_size),
        )
        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(c.vocabulary),
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads,
                num_key_value_heads=c.num_attention_heads,
                max_position_embeddings=c.num_frames + 64,
                tie_word_embeddings=True,
                initializer_range=0.05,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
        self.eval()

    @classmethod
    def upgrade_config(cls, fields: Mapping[str, Any], version: int) -> dict[str, Any]:
        """See `HubModel.upgrade_config`. Version 1 spelled one word of its vocabulary "colour"."""
        values = {_VERSION_1.get(name, name): value for name, value in fields.items()}
        if isinstance(words := values.get("vocabulary"), list):
            values["vocabulary"] = ["color" if word == "colour" else word for word in words]
        if isinstance(vqtoken := values.get("vqtoken"), Mapping):
            values["vqtoken"] = upgrade_vqtoken_config(vqtoken)
        return values

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """For `AutoVideoProcessor` and `AutoProcessor` of transformers."""
        return video_files(self.config.image_size, self.config.num_frames)

    @property
    def support(self) -> BudgetSupport:
        """That of its own VQToken."""
        return self.vqtoken.support

    @property
    def native_cost(self) -> NativeCost:
        """Tokens of each frame that the model reads."""
        _, height, width = self.config.grid
        return NativeCost(per_frame=height * width)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`: exact, or a bound as `VQToken.plan` gives it.

        Args:
            items: Clips whose frames are known. The model reads `num_frames` of them, spread evenly, so every clip has
                as many native tokens. A clip of unknown duration lasts `num_frames / frames_per_second`.
            budget: Ceilings for each clip, or a list with one budget for each.

        Raises:
            BudgetError: The budget cannot be honored, or a clip has neither frames nor native tokens.
        """
        return self.vqtoken.plan([self._size(item) for item in sizes_of(items)], budget)

    def _size(self, item: ItemSize) -> ItemSize:
        frames, height, width = self.config.grid
        seconds = self._seconds if item.seconds is None else item.seconds
        if item.native is not None:
            return ItemSize(native=item.native, seconds=seconds)
        item.require("frames")
        return ItemSize(frames=frames, height=height, width=width, seconds=seconds)

    @property
    def _seconds(self) -> float:
        return self.config.num_frames / self.config.frames_per_second

    def encode(self, clips: Tensor) -> TokenBatch:
        """Native tokens of clips.

        Args:
            clips: (B, num_frames, 3, image_size, image_size) uint8, or floating point in [0, 1].

        Raises:
            ValueError: a clip has another shape, or holds NaN or values outside of [0, 1].
        """
        c = self.config
        shape = (c.num_frames, 3, c.image_size, c.image_size)
        if clips.ndim != 5 or clips.shape[1:] != shape:
            raise ValueError(f"expected clips (B, {', '.join(map(str, shape))}), not {tuple(clips.shape)}")
        if clips.dtype == torch.uint8:
            clips = clips / 255
        elif not bool(((clips >= 0) & (clips <= 1)).all()):
            raise ValueError("clips of floating point lie in [0, 1] and hold no NaN")
        pixels = clips.flatten(0, 1).to(self.project.weight.dtype) * 2 - 1
        contents = self.project(self.encoder.forward_features(pixels)).unflatten(0, clips.shape[:2]).flatten(1, 2)
        contents = contents / math.sqrt(contents.shape[2])
        position = position_code(c.grid).to(contents) * c.position_weight
        embeddings = torch.cat([contents, position.expand(len(clips), -1, -1)], -1)
        return TokenBatch.from_embeddings(embeddings, seconds=[self._seconds] * len(clips), grids=[c.grid] * len(clips))

    def prefill(self, tokens: TokenBatch) -> PrefixCache:
        """Reads clips once, for any number of calls of `score`.

        Args:
            tokens: native or reduced; real tokens of an item in the order of their positions.
        """
        c = self.config
        sizes = torch.ones_like(tokens.positions) if tokens.sizes is None else tokens.sizes.clamp(min=1)
        contents, position = tokens.embeddings.split([c.token_dim - POSITION_DIM, POSITION_DIM], -1)
        # Every coordinate about as large as the next, whatever their shares in the length of a token are.
        contents = contents * math.sqrt(contents.shape[2])
        position = position * (math.sqrt(POSITION_DIM) / c.position_weight)
        features = torch.cat([contents, position, sizes.to(contents).log()[..., None] / 4], -1)
        states = self.read(features.masked_fill(~tokens.mask[..., None], 0.0))
        frames = tokens.positions // (c.grid[1] * c.grid[2])
        return prefill(self.lm, unpad_rows(states, tokens.mask), unpad_rows(frames, tokens.mask))

    def forward(self, tokens: TokenBatch, questions: Tensor) -> Tensor:
        """Scores of every word as the answer to every question; `prefill` and `score` in one."""
        return self.score(self.prefill(tokens), questions)

    def score(self, clips: PrefixCache, questions: Tensor) -> Tensor:
        """Scores of every word as the answer to every question. Questions do not attend to each other.

        Args:
            clips: B clips, as `prefill` read them.
            questions: (B, Q, L) int64 token ids, 0 after the end of each.

        Returns:
            (B, Q, V).
        """
        return score_next(self.lm, clips, questions, start=self.config.num_frames)

    ask = score  # its name of the first release

    @torch.inference_mode()
    def answer(
        self,
        clips: Tensor,
        questions: Sequence[Sequence[str]],
        budget: BudgetLike | Sequence[BudgetLike] = 32,
        reducer: TokenReducer | None = None,
    ) -> list[list[Answer]]:
        """Answers the questions about each clip; those about one clip do not influence each other.

        Args:
            clips: as `encode` takes them.
            questions: any number for each clip, of the words of `questions.py`.
            budget: ceilings for each clip, or a list with one budget for each; `100%` keeps all native tokens.
            reducer: in place of the model's own VQToken.

        Raises:
            BudgetError: the budget cannot be honored.
            ValueError: another number of clips than of lists of questions, an unknown word, or a bad clip.
        """
        if len(questions) != len(clips):
            raise ValueError(f"{len(clips)} clips but questions for {len(questions)}")
        encoded = [[encode_text(text) for text in texts] for texts in questions]
        count = max((len(texts) for texts in encoded), default=0)
        length = max((len(words) for texts in encoded for words in texts), default=0)
        if not count or not length:
            return [[] for _ in questions]
        ids = torch.zeros(len(clips), count, length, dtype=torch.long, device=self.project.weight.device)
        for i, texts in enumerate(encoded):
            for j, words in enumerate(texts):
                ids[i, j, : len(words)] = torch.tensor(words)
        tokens = (reducer or self.vqtoken).reduce(self.encode(clips), budget)
        confidences, answers = self(tokens, ids).softmax(-1).max(-1)
        return [
            [
                Answer(self.config.vocabulary[word], confidence, usage)
                for word, confidence in zip(words[: len(texts)], sure[: len(texts)], strict=True)
            ]
            for texts, words, sure, usage in zip(
                questions, answers.tolist(), confidences.tolist(), tokens.usage, strict=True
            )
        ]
