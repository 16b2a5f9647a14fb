"""VQ-attention: the contract of all models, the identity at the start, and what the published one does instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.model_contract import ModelContract, Outputs
from tests.tokenizers.vqtoken.clips import noise
from tokenthrift.budget import TokenBudget
from tokenthrift.config import ConfigError
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import AttentionConfig, VQToken, VQTokenConfig
from tokenthrift.vqtoken.attention import ReleasedVQAttention, VQAttention
from tokenthrift.vqtoken.token_hash import FEATURES

ATTENTION = AttentionConfig(hidden_size=24, num_attention_heads=4, intermediate_size=48, num_patches=6)
Item = tuple[int, int]  # frames, seed
BUDGET = TokenBudget(max_tokens=7)


def clip(item: Item) -> Tensor:
    frames, seed = item
    return noise(seed, 1, 6, 24) + 0.7 * noise(seed + 1, frames, 6, 24)


def batch(items: list[Item]) -> TokenBatch:
    return TokenBatch.from_items([clip(i).flatten(0, 1) for i in items], grids=[(n, 2, 3) for n, _ in items])


class Contract(ModelContract):
    """Codes of clips of unequal length."""

    config: VQTokenConfig

    def build(self) -> VQToken:
        model = VQToken(self.config)
        if isinstance(model.cross_attention, VQAttention):
            torch.nn.init.normal_(model.cross_attention.gate, std=0.3)  # away from its start, where nothing flows
        return model

    def items(self) -> list[Item]:
        return [(4, 1), (7, 2), (3, 3)]

    def outputs(self, model: VQToken, items: list[Item]) -> Outputs:
        return [[codes] for codes in model(batch(items), BUDGET).items()]

    def shapes(self, model: VQToken, item: Item) -> list[tuple[int, ...]]:
        return [(7, 24)]

    def loss(self, model: VQToken, items: list[Item]) -> Tensor:
        aims = [noise(50 + seed, 7, 24) for _, seed in items]
        parts = [(out[0] - aim).square().mean() for out, aim in zip(self.outputs(model, items), aims, strict=True)]
        return torch.stack(parts).mean()


class TestCorrected(Contract):
    config = VQTokenConfig(attention=ATTENTION)
    learning_rate = 1e-2


class TestReleased(Contract):
    config = VQTokenConfig(attention=ATTENTION, compat="released")
    learnt = 0.7
    """Its output is a layer norm of 24 channels: it cannot reach every aim."""


def test_a_fresh_module_changes_no_bit() -> None:
    tokens = batch([(5, 0), (3, 1)])
    plain, fresh = VQToken().reduce(tokens, BUDGET), VQToken(VQTokenConfig(attention=ATTENTION)).reduce(tokens, BUDGET)
    assert torch.equal(plain.embeddings, fresh.embeddings)
    assert torch.equal(plain.positions, fresh.positions)


def test_renumbered_codes_come_out_renumbered_and_scale_goes_through() -> None:
    torch.manual_seed(0)
    attention = VQAttention(24, 4, 48)
    torch.nn.init.normal_(attention.gate)
    codes, features, live = noise(0, 2, 7, 24), noise(1, 2, 7, FEATURES), torch.ones(2, 7, dtype=torch.bool)
    live[1, 4:] = False
    out = attention(codes, features, live)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        attention(codes[:, order], features[:, order], live[:, order])[live[:, order]], out[:, order][live[:, order]]
    )
    torch.testing.assert_close(attention(20 * codes, features, live), 20 * out, rtol=1e-3, atol=1e-3)
    garbage = codes.masked_fill(~live[..., None], 1e3)
    torch.testing.assert_close(attention(garbage, features, live)[live], out[live])


def test_the_published_attention_makes_the_larger_of_frames_and_codes() -> None:
    torch.manual_seed(0)
    attention = ReleasedVQAttention(16, 2, 32, 6).eval()
    codes = noise(0, 4, 16)
    index_map = torch.randint(0, 4, (6, 6))
    out = attention(index_map, codes)
    assert out.shape == (6, 16)
    assert attention(index_map[:3], codes).shape == (4, 16)
    renumbered = torch.tensor([2, 0, 3, 1])
    other = attention(renumbered[index_map], codes[renumbered.argsort()])
    assert (other - out).norm() > 0.1 * out.norm()  # the same partition under other numbers is another input to it


def test_the_published_model_refuses_what_would_break_its_budget() -> None:
    model = VQToken(TestReleased.config)
    with pytest.raises(ValueError, match="7 tokens for 9 frames"):
        model.reduce(batch([(9, 0)]), BUDGET)
    with pytest.raises(ValueError, match="1 x 1 cells a frame, the published attention reads 6"):
        model.reduce(replace(batch([(4, 0)]), grids=None), BUDGET)
    out = model.compress(batch([(4, 0), (7, 1)]), BUDGET)
    assert [usage.used for usage in out.tokens.usage] == [7, 7]
    assert out.tokens.positions.diff(dim=1).min() > 0
    assert [m.shape for m in out.maps] == [(4, 2, 3), (7, 2, 3)]


def test_the_attention_names_the_width_it_reads() -> None:
    with pytest.raises(ValueError, match="5 wide, the attention reads 24"):
        VQToken(TestCorrected.config).reduce(TokenBatch.from_items([noise(0, 9, 5)]), BUDGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 25}, "multiple of num_attention_heads"),
        ({"num_attention_heads": 0}, "between 1"),
        ({"intermediate_size": 10**6}, "intermediate_size"),
        ({"num_patches": 0}, "num_patches"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(ATTENTION, **change)


def test_keys_of_the_published_checkpoint() -> None:
    names = list(VQToken(TestReleased.config).state_dict())
    assert len(names) == 20
    assert all(
        name.startswith(("cross_attention.to_q_proj.", "cross_attention.transformer_decoder.layers.0."))
        for name in names
    )
