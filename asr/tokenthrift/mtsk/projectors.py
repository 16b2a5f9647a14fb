"""One projector per rate and modality, from compressed states to the language model's embeddings.

Source: Llama-MTSK (arXiv 2503.06362), section 3.1, with the key names of the published code
(`audio_proj.{k}.{0,2,3}.{weight,bias}`, k the place in the list of rates).

Differs from the published code: stacking several rates with LayerNorm works, where it crashed for audio; and the norm
is a module of its own, where one file of the authors passed it as the `bias` argument of a Linear, so there was none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tokenthrift.mtsk.compression import Compression

__all__ = ["projectors"]


def projectors(
    rates: Sequence[int], states: int, inner: int, width: int, kind: Compression, *, norm: bool = True
) -> nn.ModuleList:
    """A projector per rate, in the order given.

    Args:
        rates: states per token.
        states: width of an encoder state.
        inner: width between the two layers (2048 as published).
        width: width of the language model.
        kind: how states become a token, which says how wide a token is.
        norm: a LayerNorm at the end.
    """
    rows = []
    for rate in rates:
        layers = [nn.Linear(states * (rate if kind == "stack" else 1), inner), nn.ReLU(), nn.Linear(inner, width)]
        rows.append(nn.Sequential(*layers, *([nn.LayerNorm(width)] if norm else [])))
    return nn.ModuleList(rows)
