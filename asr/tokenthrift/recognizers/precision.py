"""Linear layers in 8 bits on a processor, for any recognizer made of PyTorch modules.

Weights have one scale for each output, inputs one for each row (a state or a token), so what a layer gives for a row
does not depend on the rows beside it, as it does with PyTorch's own dynamic quantization, which has one scale for all.
torchao has one for each, and without compilation is slower than float32 on a processor (2.0 against 0.27 ms for one row
through two layers of 384 by 1,536, measured with torchao 0.18).

In float32 the rest of a network, attention above all, differs in its last bits between one row and many. Rounded to 8
bits such a difference may grow a thousand times, so items go through such a model one by one, and a language model
whose text is certified takes inputs of 16 bits, in two products of 8. With 8, scores of tokens that are read together
and one by one differ by up to a hundredth of their norm in `dllm-asr-tiny-en`, with 16 by a ten-thousandth.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tokenthrift.backbones.whisper_decoder import WhisperDecoder
from tokenthrift.budget import BudgetLike, BudgetSupport, DecodeLike, SizeLike, TokenUsage, budgets_for
from tokenthrift.transcript import AudioVisualRecognizer, Recognizer, Transcript

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Int8Linear", "OneByOne", "with_precision"]

SMALLEST = 1e-12  # of the largest number of a row, so that a row of zeros stays one


class Int8Linear(nn.Module):
    """A linear layer whose products are of 8-bit numbers, summed exactly; for inference.

    Args:
        weight: (outputs, inputs).
        bias: (outputs,), if any.
        input_bits: 16 are two inputs of 8 bits, the second what the first leaves over. On a processor that would
            saturate sums of 8-bit products (x86 without VNNI) they are 14, and 8 are 7.
    """

    limits: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, input_bits: Literal[8, 16] = 8) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.input_bits = input_bits
        self._packed = _packed(weight.detach().float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self._reduced = _saturates(torch.backends.quantized.engine)
        self._most = 63 if self._reduced else 127
        # PyTorch takes the scale of an input from its extremes. With these two rows below it is always 1.
        limits = torch.tensor([[-0.5], [0.5]]).expand(-1, self.in_features) * (2 * self._most + 1)
        self.register_buffer("limits", limits.contiguous(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) in float32, as 8 bits have it; unpacked at each call."""
        weight: Tensor = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) of any floating-point type to (..., outputs) in float32."""
        rows, most = x.reshape(-1, self.in_features).float(), self._most
        largest = rows.abs().amax(1, keepdim=True).clamp_(min=SMALLEST)
        scaled = rows * (most / largest)
        parts = [scaled, self.limits]
        if self.input_bits == 16:
            coarse = scaled.round()
            parts = [coarse, scaled.sub_(coarse).mul_(2 * most), self.limits]
        product: Tensor = torch.ops.quantized.linear_dynamic(torch.cat(parts), self._packed, self._reduced)
        if self.input_bits == 16:
            product = torch.add(product[: len(rows)], product[len(rows) : -2], alpha=0.5 / most)
        else:
            product = product[:-2]
        scale = largest / most
        out = product * scale if self.bias is None else torch.addcmul(self.bias, product, scale)
        return out.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        raise RuntimeError("a model in 8 bits is for inference; save it before its precision is changed")


def _packed(weight: Tensor) -> Any:
    scales = weight.abs().amax(1).clamp(min=SMALLEST).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # PyTorch announces the end of such tensors, which the newest release supported here still has.
        warnings.simplefilter("ignore")
        small = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(small, None)


@cache
def _saturates(engine: str) -> bool:
    """Whether this processor cuts sums of products, which has to be tried: not every kernel uses what it has."""
    rows = torch.tensor([[1.0], [-1.0]]).expand(2, 64)
    (most, _), _ = torch.ops.quantized.linear_dynamic(rows.contiguous(), _packed(torch.ones(2, 64)), False).tolist()
    return bool(most < 60)


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
        network: its modules; changed in place. It may name modules in `certified_parts`, whose inputs have 16 bits.
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
    network.float()
    for name in getattr(network, "certified_parts", ()):
        _in_8_bits(getattr(network, name), 16)
    _in_8_bits(network, 8)
    return OneByOne(recognizer)


def _in_8_bits(network: nn.Module, input_bits: Literal[8, 16]) -> None:
    made: dict[nn.Module, Int8Linear] = {}
    for module in list(network.modules()):
        for name, part in list(module._modules.items()):  # a layer may have several names
            if type(part) is nn.Linear:  # what is derived from it may compute otherwise
                if part not in made:
                    made[part] = Int8Linear(part.weight, part.bias, input_bits)
                setattr(module, name, made[part])
        if isinstance(module, WhisperDecoder) and module.projection is None:
            module.projection = Int8Linear(module.embed_tokens.weight, None, input_bits)
