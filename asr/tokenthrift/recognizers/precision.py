"""Linear layers in 8 bits on a processor, for any recognizer made of PyTorch modules.

PyTorch's dynamic quantization: weights in 8 bits ahead of time, inputs as they come. Its scale of an input is one for
the whole tensor, so a row of a batch would depend on its neighbors; items therefore go through such a model one by one.
torchao, which is to follow it, has a scale a row, and without compilation is slower than float32 on a processor (2.0
against 0.27 ms for one row through two layers of 384 by 1,536, measured with torchao 0.18).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeLike, SizeLike, TokenUsage, budgets_for
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["OneByOne", "with_precision"]


class OneByOne:
    """A `Recognizer` that gives another one an item at a time."""

    def __init__(self, inner: Recognizer) -> None:
        self.inner = inner

    @property
    def support(self) -> BudgetSupport:
        """That of the recognizer inside, as all that follows."""
        return self.inner.support

    @property
    def reads_sentences_alone(self) -> bool:
        """Whether it reads a sentence better alone."""
        return getattr(self.inner, "reads_sentences_alone", False)

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.inner.sample_rate

    @property
    def max_seconds(self) -> float:
        """The longest item."""
        return self.inner.max_seconds

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """What items will use."""
        return self.inner.plan(items, budget)

    def transcribe(
        self, audio: Sequence[Tensor], budget: BudgetLike | Sequence[BudgetLike] = None, decode: DecodeLike = None
    ) -> list[Transcript]:
        """Transcribes items, one after another."""
        limits: Iterable[Any] = budgets_for(budget, len(audio))
        return [self.inner.transcribe([item], limit, decode)[0] for item, limit in zip(audio, limits, strict=True)]


def with_precision(recognizer: Any, network: nn.Module, precision: str | None) -> Recognizer | AudioVisualRecognizer:
    """The recognizer in the precision that is asked for.

    Args:
        recognizer: in float32, or on an accelerator in that of its checkpoint.
        network: its modules; changed in place.
        precision: "float32", "int8", or None for as it is.

    Raises:
        ValueError: "int8" off a processor, or of a recognizer that reads lips.
    """
    if precision is None:
        return recognizer  # type: ignore[no-any-return]
    if precision != "int8":
        network.float()
        return recognizer  # type: ignore[no-any-return]
    if isinstance(recognizer, AudioVisualRecognizer):
        raise ValueError("precision='int8' is for recognizers of sound; this one reads lips")
    if (device := next(network.parameters()).device).type != "cpu":
        raise ValueError(f"precision='int8' is for processors; this model is on {device}")
    with warnings.catch_warnings():
        # PyTorch 2.10 and later announce the end of this module, which the newest one supported here still has.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        # A model may say which of its parts.
        for part in [getattr(network, name) for name in getattr(network, "int8_parts", ())] or [network]:
            quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return OneByOne(recognizer)
