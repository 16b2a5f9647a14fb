"""KARL's tokens in front of language models of every backbone, and what a projector refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tokenizers.karl.tiny_karl import pictures, tiny_config, tiny_karl
from tokenthrift.backbones.causal import CausalBackbone
from tokenthrift.backbones.prefix import PrefixBackbone, language_model
from tokenthrift.karl.tokens_to_llm import TokenProjector
from tokenthrift.tokens import TokenBatch

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama() -> CausalBackbone:
    config = AutoConfig.for_model("llama", **SIZES, bos_token_id=None, eos_token_id=None)
    return CausalBackbone(AutoModelForCausalLM.from_config(config))


def tokens_of(count: int, seed: int = 0) -> TokenBatch:
    """Items of 1 to 6 tokens that differ, with codes."""
    random = torch.Generator().manual_seed(seed)
    tokens = TokenBatch.from_items([torch.randn(1 + i % 6, 12, generator=random) for i in range(count)])
    return replace(tokens, codes=torch.randint(0, 32, tokens.mask.shape, generator=random))


@pytest.mark.parametrize("source", ["codes", "values"])
def test_words_follow_the_tokens(source: Literal["codes", "values"]) -> None:
    torch.manual_seed(0)
    tokens, backbone = tokens_of(6), llama()
    projector = TokenProjector(tiny_config(), backbone.memory_size, source)
    optimizer = torch.optim.Adam([*backbone.parameters(), *projector.parameters()], 1e-2)
    words, mask = torch.arange(6)[:, None], torch.ones(6, 1, dtype=torch.bool)
    for _ in range(40):
        prefix = projector(tokens)
        logits = backbone(prefix.embeddings, prefix.mask, words, mask)
        loss = torch.nn.functional.cross_entropy(logits[:, 0], words[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(weight.grad is not None for weight in projector.parameters())
    with torch.no_grad():
        prefix = projector(tokens)
        assert prefix.usage == tokens.usage
        said = backbone.generate(prefix.embeddings, prefix.mask, max_new_tokens=1, end=39)
        assert [list(one.ids) for one in said] == words.tolist()
        # An item's words do not depend on its neighbours.
        alone = projector(tokens.select([2]).first(3))
        (said_alone,) = backbone.generate(alone.embeddings, alone.mask, max_new_tokens=1, end=39)
        assert list(said_alone.ids) == [2]


def test_masked_diffusion_backbones_take_them_too() -> None:
    karl = tiny_karl(decisive=True)
    backbone = PrefixBackbone(language_model({"model_type": "llama", **SIZES}), mask_id=39)
    prefix = TokenProjector(karl.config, backbone.memory_size)(karl.encode(pictures(3), "e0.1"))
    context = backbone.context(prefix.embeddings, prefix.mask)
    logits = backbone(torch.full((3, 4), 39), torch.ones(3, 4, dtype=torch.bool), context)
    assert logits.shape == (3, 4, 40)


@pytest.mark.parametrize("source", ["codes", "values"])
def test_order_and_codes_matter(source: Literal["codes", "values"]) -> None:
    karl = tiny_karl()
    codes = [3, 1, 4, 15]
    projector = TokenProjector(karl.config, 16, source)
    out = projector(karl.from_codes([codes])).embeddings
    assert out.shape == (1, 4, 16)
    # Without positions a token would give the same embedding wherever it stands.
    moved = projector(karl.from_codes([codes[::-1]])).embeddings.flip(1)
    assert ((out - moved).abs().amax(2) > 1e-3).all()
    later = projector(karl.from_codes([codes], [[5, 6, 7, 8]])).embeddings
    assert ((out - later).abs().amax(2) > 1e-3).all()
    other = projector(karl.from_codes([[3, 1, 5, 15]])).embeddings
    assert ((out - other).abs().amax(2) > 1e-3).tolist() == [[False, False, True, False]]


def test_continuous_tokens_have_no_codes() -> None:
    with pytest.raises(ValueError, match='source="values"'):
        TokenProjector(tiny_config(codebook_size=None), 16, "codes")
    projector = TokenProjector(tiny_config(), 16, "codes")
    with pytest.raises(ValueError, match="no codes"):
        projector(tiny_karl(tiny_config(codebook_size=None)).encode(pictures(1)))
