"""KARL's tokens as embeddings that a language model reads.

Source: the projector of LLaVA (arXiv 2304.08485), for the tokens of KARL (arXiv 2507.07995), which nobody put into a
language model. The result is what the backbones of `tokenthrift.backbones` take as a prefix or memory, whatever their
kind: embeddings of their size and a mask.

Codes are looked up in a table of their own, as words of a language model are; values (the continuous tokens, or
the quantized ones as the image decoder reads them) go through a perceptron. Both get a learned position, since KARL's
tokens are ordered: the first carry most.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from tokenthrift.karl.config import KarlConfig
from tokenthrift.tokens import TokenBatch

__all__ = ["TokenProjector"]


class TokenProjector(nn.Module):
    """Tokens of a KARL model to embeddings of a language model.

    Args:
        config: of the KARL model.
        output_size: of the language model's embeddings, `memory_size` of a backbone.
        source: what of a token is read.
        hidden_size: of the perceptron; `output_size` if not given.

    Raises:
        ValueError: codes are to be read and the model has none.
    """

    def __init__(
        self,
        config: KarlConfig,
        output_size: int,
        source: Literal["codes", "values"] = "codes",
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        if source == "codes" and config.codebook_size is None:
            raise ValueError('this model has continuous tokens and no codes; use source="values"')
        self.source = source
        hidden = hidden_size or output_size
        self.table = None
        if source == "codes" and config.codebook_size is not None:
            self.table = nn.Embedding(config.codebook_size, hidden)
        self.lift = None if self.table is not None else nn.Linear(config.token_dim, hidden)
        self.positions = nn.Embedding(config.max_position_embeddings, hidden)
        self.project = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, output_size)
        )

    def forward(self, tokens: TokenBatch) -> TokenBatch:
        """The same tokens, `(B, N, output_size)`; what padding holds is unspecified and finite.

        Args:
            tokens: of `Karl.encode`, or of `Karl.from_codes`.

        Raises:
            ValueError: the tokens have no codes where codes are read.
        """
        states: Tensor
        if self.table is not None:
            if tokens.codes is None:
                raise ValueError("these tokens have no codes")
            states = self.table(tokens.codes.clamp(min=0))
        else:
            assert self.lift is not None
            states = self.lift(tokens.embeddings.masked_fill(~tokens.mask[..., None], 0))
        states = states + self.positions(tokens.positions.clamp(min=0))
        return replace(tokens, embeddings=self.project(states))
