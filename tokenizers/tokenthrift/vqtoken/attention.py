"""VQ-attention: codes that know where and when they are seen.

Source: VQToken (arXiv 2503.16980, section 3.4): B' = Attention(Q = B W_Q, K = B W_K, V = H W_V) with the codebook B of
a clip and features H of its token hash. `VQAttention` is that, with what the paper leaves open filled in: H is an MLP
of `token_hash.describe`; a code also receives its own H directly, because at first all queries look alike and would
receive the same average; the result is added to B through a gate that starts at zero, in units of the codes' own
scale. So a fresh module changes nothing, a clip has exactly as many tokens as codes, and token k is code k.

`ReleasedVQAttention` is what the published code computes instead, with its 20 weights by name: queries are the rows of
the index map, raw numbers cast to float; keys and values are the codebook; the shorter of the two is repeated in a
cycle, so that max(T, K) tokens come out; and nothing of B is added to the output but what attention lets through.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from tokenthrift.vqtoken.token_hash import FEATURES

__all__ = ["ReleasedVQAttention", "VQAttention"]


class VQAttention(nn.Module):
    """Adds to every code of a clip what the token hash says.

    Args:
        width: Of the codes.
        heads: Of the attention.
        ffn: Width inside the feed-forward part.
    """

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.hash_in = nn.Linear(FEATURES, width)
        self.hash_out = nn.Linear(width, width)
        self.code_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        # Without a bias: one would add the same to every score of a query, which the softmax takes out again.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, codes: Tensor, features: Tensor, live: Tensor) -> Tensor:
        """Codes with their place and motion.

        Args:
            codes: (B, K, width) float32.
            features: (B, K, FEATURES) as from `token_hash.describe`.
            live: (B, K) bool, which codes exist; at least one of every clip.

        Returns:
            (B, K, width) float32; where no code exists it means nothing.
        """
        dtype = self.gate.dtype
        hashed = self.hash_out(gelu(self.hash_in(features.to(dtype))))
        normed = self.code_norm(codes.to(dtype))
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(normed), self.key(normed), self.value(hashed))
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=live[:, None, None])
        state = hashed + self.out(mixed.transpose(1, 2).flatten(2))
        state = state + self.ffn_out(gelu(self.ffn_in(self.ffn_norm(state))))
        power = codes.detach().square().mean(2) * live
        scale = (power.sum(1) / live.sum(1)).sqrt()[:, None, None]
        return cast(Tensor, codes + scale * (self.gate * state).to(codes.dtype))


class ReleasedVQAttention(nn.Module):
    """The published attention: one post-norm decoder layer over index map rows and codes.

    Args:
        width: Of the codes.
        heads: Of the attention.
        ffn: Width inside the feed-forward part; 2048 in the published model.
        patches: Tokens of a frame.
    """

    def __init__(self, width: int, heads: int, ffn: int, patches: int) -> None:
        super().__init__()
        self.to_q_proj = nn.Linear(patches, width)
        layer = nn.TransformerDecoderLayer(width, heads, ffn, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, num_layers=1)

    def forward(self, index_map: Tensor, codes: Tensor) -> Tensor:
        """Mixes the codes of one clip.

        Args:
            index_map: (T, patches) int64.
            codes: (K, width).

        Returns:
            (max(T, K), width); row i is about frame i mod T.
        """
        rows = torch.arange(max(len(index_map), len(codes)), device=codes.device)
        queries = self.to_q_proj(index_map[rows % len(index_map)].to(self.to_q_proj.weight.dtype))
        memory = codes[rows % len(codes)].to(queries.dtype)
        return cast(Tensor, self.transformer_decoder(queries[None], memory[None])[0])
