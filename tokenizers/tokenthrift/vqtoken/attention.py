"""VQ-attention: each code learns where and when its tokens lie in the clip.

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
    """Adds what the token hash says of every code to that code.

    Args:
        hidden_size: Width of the codes.
        num_attention_heads: Number of attention heads.
        intermediate_size: Width inside the feed-forward part.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.hash_in = nn.Linear(FEATURES, hidden_size)
        self.hash_out = nn.Linear(hidden_size, hidden_size)
        self.code_norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        # Without a bias: one would add the same to every score of a query, which the softmax takes out again.
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.ffn_norm = nn.LayerNorm(hidden_size)
        self.ffn_in = nn.Linear(hidden_size, intermediate_size)
        self.ffn_out = nn.Linear(intermediate_size, hidden_size)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, codes: Tensor, features: Tensor, live: Tensor) -> Tensor:
        """Returns the codes with what their position and motion add.

        Args:
            codes: (B, K, hidden_size) float32.
            features: (B, K, FEATURES) as from `token_hash.describe`.
            live: (B, K) bool, which codes exist; at least one of every clip.

        Returns:
            (B, K, hidden_size) float32; rows where no code exists hold no meaning.
        """
        dtype = self.gate.dtype
        hashed = self.hash_out(gelu(self.hash_in(features.to(dtype))))
        normed = self.code_norm(codes.to(dtype))
        query, key, value = (
            part.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
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
        hidden_size: Width of the codes.
        num_attention_heads: Number of attention heads.
        intermediate_size: Width inside the feed-forward part; 2048 in the published model.
        num_patches: Tokens of a frame.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, intermediate_size: int, num_patches: int) -> None:
        super().__init__()
        self.to_q_proj = nn.Linear(num_patches, hidden_size)
        layer = nn.TransformerDecoderLayer(hidden_size, num_attention_heads, intermediate_size, batch_first=True)
        self.transformer_decoder = nn.TransformerDecoder(layer, num_layers=1)

    def forward(self, index_map: Tensor, codes: Tensor) -> Tensor:
        """Attends from the rows of the index map to the codes of one clip.

        Args:
            index_map: (T, num_patches) int64.
            codes: (K, hidden_size).

        Returns:
            (max(T, K), hidden_size); row i is about frame i mod T.
        """
        rows = torch.arange(max(len(index_map), len(codes)), device=codes.device)
        queries = self.to_q_proj(index_map[rows % len(index_map)].to(self.to_q_proj.weight.dtype))
        memory = codes[rows % len(codes)].to(queries.dtype)
        return cast(Tensor, self.transformer_decoder(queries[None], memory[None])[0])
