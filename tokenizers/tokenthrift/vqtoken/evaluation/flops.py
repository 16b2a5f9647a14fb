"""Work and time of the steps from frames to an answer, measured, not estimated.

Floating-point operations are those of matrix products, as `torch.utils.flop_counter` counts them (a multiply-add is
two); attention is broken up into its products for that, as the counter knows no CPU kernel, and counts its causal half
in full. The published table gives module and language model together, and a throughput of which the unit changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Stopwatch", "count_flops"]

T = TypeVar("T")


def count_flops(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and the floating-point operations of its matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        result = work()
    return result, counter.get_total_flops()


class Stopwatch:
    """Adds up wall-clock seconds by name.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time until the context is left; waits for the accelerator at both ends."""
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
