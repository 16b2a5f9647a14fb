"""Whether a processor computes in bf16: mixed precision takes seven times as long on one that only imitates it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

__all__ = ["cpu_has_bf16", "warn_of_slow_precision"]


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16, as far as PyTorch knows."""
    known: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return known is not None and bool(known())


def warn_of_slow_precision(device: str, precision: str | int | None) -> None:
    """A warning where a run would compute in bf16 on a processor that has no instructions for it.

    Args:
        device: type of the device that computes.
        precision: that of the Trainer, as "bf16-mixed".
    """
    if device == "cpu" and str(precision).startswith("bf16") and not cpu_has_bf16():
        warnings.warn(
            f"this processor has no bf16 instructions, so precision {precision} is several times slower than float32: "
            "--trainer.precision 32-true",
            UserWarning,
            stacklevel=2,
        )
