"""Questions about a video, answered by LLaVA-OneVision through VQToken: what the published evaluation runs.

    chat = VideoChat.from_pretrained("converted")        # as `tokenthrift convert vqtoken` writes it
    chat.answer(read_frames("clip.mp4", count=32, size=chat.size).pixels, "What is he doing?", 33).text

Source: VQToken (arXiv 2503.16980, section 4 and the evaluation script): frames squeezed to the encoder's square, ChatML
prompt, one video before the question, greedy decoding. Everything is transformers' own LlavaOnevision class with a
reducer attached; the published code is a fork of LLaVA. Two choices are made by the checkpoint:

* A published checkpoint clusters all 729 patches of a frame, before the 2 x 2 pooling of LLaVA-OneVision, so for it the
  pooling is skipped (`unpooled`). VQToken without weights reduces the 196 pooled ones that the language model knows.
* The language model reads one more row than codes, the newline. A budget counts it: K codes cost K + 1 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from tokenthrift.attachment import attach
from tokenthrift.budget import BudgetLike, ItemSize, TokenUsage
from tokenthrift.config import from_plain, to_plain
from tokenthrift.hub import CONFIG
from tokenthrift.sources import SourceError
from tokenthrift.vqtoken.config import VQTokenConfig
from tokenthrift.vqtoken.model import VQToken

__all__ = ["VLM", "Answer", "VideoChat", "unpooled"]

VLM: Final = "vlm"
"""The folder inside a converted model's that holds the language model in transformers' own format."""
NEWLINES: Final = 1
_LONG: Final = 1e6  # seconds, in which no rate allows less than the other ceilings


class Answer(NamedTuple):
    """The answer, and the token usage of the video; None where there was no video."""

    text: str
    usage: TokenUsage | None


class VideoChat:
    """A LLaVA-OneVision of transformers with its tokenizer and a VQToken.

    Args:
        model: LlavaOnevisionForConditionalGeneration.
        tokenizer: Of the model; needs no template.
        reducer: One with the published attention reads unpooled patches.
    """

    def __init__(self, model: Any, tokenizer: Any, reducer: VQToken | None = None) -> None:
        if model.config.model_type != "llava_onevision":
            raise ValueError(
                f"VideoChat works with LLaVA-OneVision, not {model.config.model_type}; use attach() instead"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.reducer = VQToken() if reducer is None else reducer.eval()
        self.pooled = self.reducer.config.compat == "corrected"

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        selection_method: str | None = None,
    ) -> Self:
        """Loads a converted checkpoint, or any LLaVA-OneVision of transformers with VQToken without weights.

        Args:
            source: A folder, or for a LLaVA-OneVision also owner/name on the Hub.
            device: Where the model goes.
            dtype: Of the language model.
            selection_method: How many codes a clip gets, as in `VQTokenConfig`, in place of the checkpoint's value.

        Raises:
            SourceError: The folder is a VQToken without a language model.
            ConfigError: There is no such selection method.
        """
        from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

        folder = Path(source)
        converted = (folder / VLM / CONFIG).is_file()
        if not converted and (folder / CONFIG).is_file() and '"system"' in (folder / CONFIG).read_text("utf-8"):
            raise SourceError(f"{source} holds no {VLM}/: it is VQToken without a language model")
        reducer = VQToken.from_pretrained(source, device=device) if converted else VQToken()
        if selection_method is not None:
            fields = to_plain(reducer.config) | {"selection_method": selection_method}
            reducer.config = from_plain(VQTokenConfig, fields, str(source))
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder / VLM if converted else source, dtype=dtype, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / VLM if converted else source)
        return cls(model.to(device), tokenizer, reducer)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames that it reads."""
        side = self.model.config.vision_config.image_size
        return side, side

    def grid(self, frames: int) -> tuple[int, int, int]:
        """Frames, rows and columns of the native tokens of a video, known without it."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        side = math.ceil(side / 2) if self.pooled else side
        return frames, side, side

    def check(self, frames: int, budget: BudgetLike) -> None:
        """Checks that a long video of so many frames can be answered about under a budget.

        Raises:
            BudgetError: The budget cannot be honored, however long the video.
        """
        grid = self.grid(frames)
        native = math.prod(grid) + NEWLINES
        self.reducer.plan(
            [ItemSize(native=native, seconds=_LONG, frames=grid[0], height=grid[1], width=grid[2])], budget
        )

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """Native tokens of a video, its newline last.

        Args:
            frames: (T, 3, height, width) uint8 of `size`.

        Returns:
            (T * h * w + 1, D).
        """
        with nullcontext() if self.pooled else unpooled(self.model):
            features = self.model.get_video_features(self._pixels(frames)).pooler_output
        return features[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def answer(
        self,
        frames: Tensor | None,
        question: str,
        budget: BudgetLike = 33,
        *,
        seconds: float | None = None,
        max_new_tokens: int = 512,
        stop: tuple[str, ...] = (),
    ) -> Answer:
        """Answers a question, greedily.

        Args:
            frames: (T, 3, height, width) uint8 of `size`; None for a question without a video.
            question: In words; no placeholder.
            budget: Ceilings for the video, newline included.
            seconds: Duration of the video, which `tokens_per_second` needs.
            max_new_tokens: Of the answer.
            stop: Texts at the first of which an answer ends.

        Raises:
            BudgetError: The budget cannot be honored.
        """
        given: dict[str, Any] = {}
        slots = 0
        if frames is not None:
            slots = math.prod(self.grid(len(frames))) + NEWLINES
            given["pixel_values_videos"] = self._pixels(frames)
        ids = self._ids(question, slots)
        given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": self.tokenizer.eos_token_id}
        durations = None if seconds is None or frames is None else (seconds,)
        with (
            nullcontext() if self.pooled else unpooled(self.model),
            attach(self.model, self.reducer, budget, seconds=durations) as handle,
        ):
            out = self.model.generate(**given, **settings)
        text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        for end in stop:
            text = text.partition(end)[0] if end else text
        return Answer(text.strip(), handle.usage[0] if handle.usage else None)

    def prompt_tokens(self, question: str) -> int:
        """Tokens of a prompt without its video."""
        return int(self._ids(question, 0).shape[1])

    def text_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _ids(self, question: str, slots: int) -> Tensor:
        """(1, L) the prompt, with a placeholder for every native token where the video stands."""
        before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        after = ("\n" if slots else "") + f"{question}<|im_end|>\n<|im_start|>assistant\n"
        head, tail = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
        ids = [*head, *[self.model.config.video_token_id] * slots, *tail]
        return torch.tensor([ids], device=self.model.device)

    def _pixels(self, frames: Tensor) -> Tensor:
        """(1, T, 3, H, W): from -1 to 1, as SigLIP reads them."""
        if frames.ndim != 4 or frames.shape[1:] != (3, *self.size) or frames.dtype != torch.uint8:
            raise ValueError(f"expected (T, 3, {self.size[0]}, {self.size[1]}) uint8 frames, not {tuple(frames.shape)}")
        return (frames.to(self.model.device, self.model.dtype) / 127.5 - 1)[None]


@contextmanager
def unpooled(model: Any) -> Iterator[None]:
    """Lets a LLaVA-OneVision of transformers give all patches of a video's frames, on this instance and until left."""
    inner = model.model
    if "apply_pooling" in vars(inner):
        raise RuntimeError("this model's pooling is taken out already; leave that context first")
    inner.apply_pooling = lambda features: features
    try:
        yield
    finally:
        del inner.apply_pooling
