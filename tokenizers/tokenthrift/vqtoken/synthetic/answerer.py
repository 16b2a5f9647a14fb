"""VideoAnswerer: a small video language model that reads a clip as native or reduced tokens and answers in one word.

The shape of the paper's system (VQToken, arXiv 2503.16980, section 3) at a size that one core can train: a ViT that
sees one frame at a time (timm's architecture), a projection, the reduction of all tokens of the clip, a Llama
(transformers) that reads what is left as a prefix of the question. Made here and trained on the synthetic questions of
`questions.py` only; it knows no other words.

What differs from LLaVA-OneVision, on which the paper builds: the last coordinates of a token are a code of its frame,
row and column, so that means of tokens keep where and when; a token stands at the position of its first frame, and the
question follows at the first position after the clip, so positions do not depend on how many tokens are kept; there is
no newline row, so tokens are counted without one; a two-layer perceptron reads tokens and how many each stands for.
Reductions are any `TokenReducer`, each read by the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tokenthrift.budget import BudgetLike, BudgetSupport, TokenBudget, TokenUsage
from tokenthrift.config import ConfigError
from tokenthrift.extras import require
from tokenthrift.hub import HubModel
from tokenthrift.reducers.base import TokenReducer
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.config import AttentionConfig, VQTokenConfig
from tokenthrift.vqtoken.model import VQToken
from tokenthrift.vqtoken.synthetic.questions import WORDS, encode_text

__all__ = ["Answer", "AnswererConfig", "VideoAnswerer", "position_code"]

_WAVES = 4
POSITION_DIM = 3 * 2 * _WAVES


@dataclass(frozen=True, kw_only=True)
class AnswererConfig:
    """A whole model; the defaults are those of the shipped one."""

    frames: int = 8
    side: int = 64
    """Pixels of a square frame."""
    patch: int = 8
    frames_per_second: float = 4.0
    """Of the clips it was trained on; gives `tokens_per_second` its meaning."""
    encoder_width: int = 128
    encoder_layers: int = 4
    encoder_heads: int = 4
    token_width: int = 192
    """Of native tokens: what the encoder says, and 24 coordinates of the place."""
    position_weight: float = 0.3
    """Length of the code of the place, beside contents of length about one."""
    width: int = 192
    """Of the language model."""
    layers: int = 3
    heads: int = 3
    ffn: int = 512
    words: list[str] = field(default_factory=lambda: list(WORDS))
    vqtoken: VQTokenConfig = field(
        default_factory=lambda: VQTokenConfig(attention=AttentionConfig(width=192, heads=4, ffn=384, patches=64))
    )

    def __post_init__(self) -> None:
        ranges = {"frames": 256, "side": 512, "patch": 64, "encoder_width": 2048, "encoder_layers": 48}
        ranges |= {"encoder_heads": 64, "token_width": 4096, "width": 4096, "layers": 64, "heads": 64, "ffn": 16_384}
        for name, high in ranges.items():
            if not 1 <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be between 1 and {high}, got {getattr(self, name)}")
        for name in ("position_weight", "frames_per_second"):
            if not 0 < getattr(self, name) <= 1000:
                raise ConfigError(f"{name} must be above 0 and at most 1000, got {getattr(self, name)}")
        if self.side % self.patch:
            raise ConfigError(f"side {self.side} must be a multiple of patch {self.patch}")
        if self.encoder_width % self.encoder_heads or self.width % (2 * self.heads):
            raise ConfigError("widths must be multiples of the numbers of heads, the language model's of twice its own")
        if self.token_width <= POSITION_DIM:
            raise ConfigError(f"token_width {self.token_width} leaves nothing beside the {POSITION_DIM} of the place")
        if self.words != list(WORDS):
            raise ConfigError("words: this model speaks another vocabulary than this release's questions")
        attention = self.vqtoken.attention
        if attention is not None and attention.width != self.token_width:
            raise ConfigError(f"vqtoken.attention.width {attention.width} must be token_width {self.token_width}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a clip's native tokens."""
        return self.frames, self.side // self.patch, self.side // self.patch


class Answer(NamedTuple):
    """A word, the probability the model gives it, and what the clip cost."""

    word: str
    confidence: float
    usage: TokenUsage


class Prefilled(NamedTuple):
    """What the language model made of B clips, real tokens first.

    Attributes:
        cache: keys and values.
        mask: (B, N) bool, which places are real.
        states: (B, N, width) after the last layer.
    """

    cache: DynamicCache
    mask: Tensor
    states: Tensor


def position_code(grid: tuple[int, int, int]) -> Tensor:
    """(T * H * W, 24): sines and cosines of frame, row and column at four wavelengths; every row has length one.

    The longest wave is twice the clip, so its mean over a cluster still tells the mean place.
    """
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3, 1)
    angles = places * (math.pi / 2) * 2.0 ** torch.arange(_WAVES)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1) / math.sqrt(3 * _WAVES)


class VideoAnswerer(HubModel):
    """Answers questions about clips; any reducer may stand between its encoder and its language model.

    Args:
        config: sizes.
    """

    system: ClassVar[str] = "vqtoken_answerer"
    config_class: ClassVar[type] = AnswererConfig
    config: AnswererConfig
    place: Tensor

    def __init__(self, config: AnswererConfig | None = None) -> None:
        super().__init__(config or AnswererConfig())
        c = self.config
        self.encoder = require("timm.models.vision_transformer").VisionTransformer(
            img_size=c.side,
            patch_size=c.patch,
            embed_dim=c.encoder_width,
            depth=c.encoder_layers,
            num_heads=c.encoder_heads,
            mlp_ratio=2.0,
            class_token=False,
            global_pool="",
            num_classes=0,
        )
        self.project = nn.Linear(c.encoder_width, c.token_width - POSITION_DIM)
        self.vqtoken = VQToken(c.vqtoken)
        self.read = nn.Sequential(
            nn.Linear(c.token_width + 1, 2 * c.width),
            nn.GELU(),
            nn.Linear(2 * c.width, c.width),
            nn.LayerNorm(c.width),  # without it states grow until the layers of the language model add nothing to them
        )
        self.lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(c.words),
                hidden_size=c.width,
                intermediate_size=c.ffn,
                num_hidden_layers=c.layers,
                num_attention_heads=c.heads,
                num_key_value_heads=c.heads,
                max_position_embeddings=c.frames + 64,
                tie_word_embeddings=True,
                initializer_range=0.05,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation="sdpa",
            )
        )

    @property
    def support(self) -> BudgetSupport:
        """That of its own VQToken."""
        return self.vqtoken.support

    def plan(self, clips: int, budget: BudgetLike) -> tuple[int, ...]:
        """Tokens of so many clips, exact or a bound as `VQToken.plan`; no clip is looked at."""
        frames, height, width = self.config.grid
        seconds = [frames / self.config.frames_per_second] * clips
        return self.vqtoken.plan([frames * height * width] * clips, TokenBudget.parse(budget), seconds)

    def encode(self, clips: Tensor) -> TokenBatch:
        """Native tokens of clips.

        Args:
            clips: (B, T, 3, side, side) uint8, or floating point in [0, 1].

        Raises:
            ValueError: a clip has another shape, or holds NaN or values outside of [0, 1].
        """
        c = self.config
        if clips.ndim != 5 or clips.shape[1:] != (c.frames, 3, c.side, c.side):
            raise ValueError(f"expected clips (B, {c.frames}, 3, {c.side}, {c.side}), not {tuple(clips.shape)}")
        if clips.dtype == torch.uint8:
            clips = clips / 255
        elif not bool(((clips >= 0) & (clips <= 1)).all()):
            raise ValueError("clips of floating point lie in [0, 1] and hold no NaN")
        pixels = clips.flatten(0, 1).to(self.project.weight.dtype) * 2 - 1
        contents = self.project(self.encoder.forward_features(pixels)).unflatten(0, clips.shape[:2]).flatten(1, 2)
        contents = contents / math.sqrt(contents.shape[2])
        place = position_code(c.grid).to(contents) * c.position_weight
        embeddings = torch.cat([contents, place.expand(len(clips), -1, -1)], -1)
        tokens = TokenBatch.from_embeddings(embeddings, seconds=[c.frames / c.frames_per_second] * len(clips))
        return replace(tokens, grids=(c.grid,) * len(clips))

    def prefill(self, tokens: TokenBatch) -> Prefilled:
        """What the language model keeps of clips.

        Args:
            tokens: native or reduced; real tokens of an item in the order of their positions.
        """
        c = self.config
        order = (~tokens.mask).long().argsort(dim=1, stable=True)
        mask = tokens.mask.gather(1, order)
        embeddings = tokens.embeddings.gather(1, order[..., None].expand(-1, -1, tokens.embeddings.shape[2]))
        positions = tokens.positions.gather(1, order).clamp(min=0) // (c.grid[1] * c.grid[2])
        sizes = torch.ones_like(mask) if tokens.sizes is None else tokens.sizes.gather(1, order).clamp(min=1)
        contents, place = embeddings.split([c.token_width - POSITION_DIM, POSITION_DIM], -1)
        # Every coordinate about as large as the next, whatever their shares in the length of a token are.
        contents = contents * math.sqrt(contents.shape[2])
        place = place * (math.sqrt(POSITION_DIM) / c.position_weight)
        features = torch.cat([contents, place, sizes.to(embeddings).log()[..., None] / 4], -1)
        states = self.read(features.masked_fill(~mask[..., None], 0.0))
        cache = DynamicCache(config=self.lm.config)
        # Padding is on the right, so the causal mask alone keeps it from the real tokens.
        if states.shape[1]:
            states = self.lm.model(
                inputs_embeds=states, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
        return Prefilled(cache, mask, states)

    def forward(self, tokens: TokenBatch, questions: Tensor) -> Tensor:
        """`ask` about clips that were not read yet; `tokens` of B of them, native or reduced."""
        return self.ask(self.prefill(tokens), questions)

    def ask(self, clips: Prefilled, questions: Tensor) -> Tensor:
        """Scores of every word as the answer to every question.

        Args:
            clips: B of them, read once; a second call needs them read anew.
            questions: (B, Q, L) int64 words, 0 after the end of each. They do not see each other.

        Returns:
            (B, Q, V).
        """
        seen = clips.mask
        words, whose, step = _packed(questions)
        own = (whose[:, :, None] == whose[:, None]) & (step[:, :, None] >= step[:, None])
        sees = torch.cat([seen[:, None].expand(-1, words.shape[1], -1), own], 2)[:, None]
        states = self.lm.model(
            input_ids=words,
            attention_mask=torch.zeros_like(sees, dtype=self.project.weight.dtype).masked_fill(~sees, -torch.inf),
            position_ids=self.config.frames + step,
            past_key_values=clips.cache,
            use_cache=True,
        ).last_hidden_state
        lengths = (questions != 0).sum(2)
        ends = (lengths.cumsum(1) - 1).clamp(min=0)
        picked = states.gather(1, ends[..., None].expand(-1, -1, states.shape[2]))
        return cast(Tensor, self.lm.lm_head(picked))

    @torch.inference_mode()
    def answer(
        self,
        clips: Tensor,
        questions: Sequence[Sequence[str]],
        budget: BudgetLike = 32,
        reducer: TokenReducer | None = None,
    ) -> list[list[Answer]]:
        """Answers the questions about each clip; those about one clip do not influence each other.

        Args:
            clips: as `encode` takes them.
            questions: any number for each clip, of the words of `questions.py`.
            budget: ceilings for each clip; `100%` keeps all native tokens.
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
        tokens = (reducer or self.vqtoken).reduce(self.encode(clips), TokenBudget.parse(budget))
        confidences, words_found = self(tokens, ids).softmax(-1).max(-1)
        return [
            [
                Answer(self.config.words[word], confidence, usage)
                for word, confidence in zip(found[: len(texts)], sure[: len(texts)], strict=True)
            ]
            for texts, found, sure, usage in zip(
                questions, words_found.tolist(), confidences.tolist(), tokens.usage, strict=True
            )
        ]

    def trainable(self, *parts: str) -> list[nn.Parameter]:
        """Parameters of the named parts, `encoder` and `project` for instance."""
        modules: dict[str, Any] = dict(self.named_children())
        return [weight for part in parts for weight in modules[part].parameters()]


def _packed(questions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Questions (B, Q, L) end to end without the zeros between: (B, P) words, whose they are, and how far in."""
    length = questions.shape[2]
    words = questions.flatten(1)
    order = (words == 0).long().argsort(dim=1, stable=True)[:, : max(int((words != 0).sum(1).max()), 1)]
    return words.gather(1, order), order // length, order % length
