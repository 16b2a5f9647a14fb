"""Low-rank adapters on queries and values, one for all scales (MS), one per scale (SS), or both (MSS).

Source: Llama-MTSK (arXiv 2503.06362), section 3.2. With W the frozen projection, s the scale factor, D and U the down
and up matrices, X the sequence at scale k:

    MS   h = X W + s X D U          SS   h = X W + s X D_k U_k          MSS   h = X W + s (X D_k U_k + X D U)

Differs from the published code: D starts at zero and stays zero until the first step. There the checkpoint loader
re-initializes everything it does not find in the language model's file, after the constructor set the zeros, so
training starts from a language model with noise in every attention layer. The adapters are hooks on the projections, so
any model whose attention has `q_proj` and `v_proj` takes them and its own weights keep their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from tokenthrift.mtsk.config import Strategy

__all__ = ["Lora", "attentions"]


class _Adapter(nn.Module):
    """X D U."""

    def __init__(self, width: int, bottleneck: int, out: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, out, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.kaiming_uniform_(self.up.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.up(self.down(x)))


class _Adapters(nn.ModuleList):
    """The adapters of one projection and which of them are in use."""

    def __init__(self, count: int, width: int, bottleneck: int, out: int, scale: float) -> None:
        super().__init__(_Adapter(width, bottleneck, out) for _ in range(count))
        self.scale = scale
        self.active: tuple[int, ...] = ()

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook; a bound method, so that a copied model calls its own copy."""
        for k in self.active:
            output = output + self.scale * self[k](inputs[0])
        return output


class Lora(nn.Module):
    """Adapters for the queries and values of every attention layer; none is in use outside of `at`.

    Args:
        attentions: modules with `q_proj` and `v_proj`, one per layer; they are hooked, not changed.
        scales: how many scales there are.
        strategy: MS, SS or MSS.
        bottleneck: rank of an adapter.
        scale: factor s of its output.
    """

    def __init__(
        self, attentions: Iterable[nn.Module], scales: int, strategy: Strategy, bottleneck: int, scale: float
    ) -> None:
        super().__init__()
        self.scales, self.strategy = scales, strategy
        count = {"MS": 1, "SS": scales, "MSS": scales + 1}[strategy]
        self.layers = nn.ModuleList()
        for attention in attentions:
            pair = nn.ModuleDict()
            for name in ("q", "v"):
                linear: Any = getattr(attention, f"{name}_proj")
                adapters = _Adapters(count, linear.in_features, bottleneck, linear.out_features, scale)
                linear.register_forward_hook(adapters.add)
                pair[name] = adapters
            self.layers.append(pair)

    @contextmanager
    def at(self, scale: int) -> Iterator[None]:
        """Puts the adapters of a scale to use for the calls inside; several threads need a model each.

        Args:
            scale: its place in the list of scales.
        """
        if not 0 <= scale < self.scales:
            raise ValueError(f"there are {self.scales} scales, so none has number {scale}")
        self._set({"MS": (0,), "SS": (scale,), "MSS": (scale, self.scales)}[self.strategy])
        try:
            yield
        finally:
            self._set(())

    def _set(self, active: tuple[int, ...]) -> None:
        for module in self.modules():
            if isinstance(module, _Adapters):
                module.active = active


def attentions(trunk: nn.Module) -> list[nn.Module]:
    """The self-attention of every layer of a Transformer that has `layers`, each with `self_attn`."""
    layers = cast(Iterable[Any], trunk.layers)
    return [layer.self_attn for layer in layers]
