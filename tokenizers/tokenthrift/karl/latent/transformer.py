"""The pre-norm transformer that both halves of KARL are made of, and what a token may see in the encoder.

Source: KARL (arXiv 2507.07995), section 3. What differs: masks are boolean, True where a query may look, and belong to
an image of the batch each; the published code tiles them in the wrong order, so that with B images only 1 / B of the
(image, head) pairs have their own.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.karl.config import TransformerConfig

__all__ = ["Transformer", "causal_latents"]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a four times wider perceptron, each behind a layer normalization."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A stack of blocks, with a normalization before it and none after it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config.hidden_size, config.num_attention_heads) for _ in range(config.num_hidden_layers)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Runs the stack.

        Args:
            x: `(B, N, hidden_size)`; finite everywhere, also where nobody looks.
            mask: bool, broadcastable to `(B, heads, N, N)`, True where the query (row) may look at the key (column);
                None where everybody sees everything.
        """
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def causal_latents(image: int, latents: int, device: torch.device) -> Tensor:
    """Who sees whom, where the image sees itself, and a latent sees the image, itself and the latents before it.

    Args:
        image: positions before the latents.
        latents: how many follow.
        device: of the result.

    Returns:
        `(N, N)` bool, N = image + latents.
    """
    total = image + latents
    mask = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    mask[:image, :image] = True
    return mask
