"""How the weights of linear layers lie in memory on a processor: column by column.

MKL, which PyTorch calls, multiplies a few rows (a draft of some tokens, a second of speech) by such weights faster than
by those that lie row by row, and one row or hundreds equally fast. Values and names stay.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["lay_out_by_columns"]


def lay_out_by_columns(module: nn.Module, *more: Tensor) -> None:
    """Lays out the weights of all linear layers that are on a processor, in place.

    Args:
        module: with linear layers.
        more: other matrices that inputs are multiplied by, as an embedding that is the output projection too.
    """
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    for weight in (*weights, *more):
        if weight.device.type == "cpu":
            weight.data = weight.data.t().contiguous().t()
