"""The prior-guided sampler against the loop that dLLM-ASR decoded with: the same tokens, confidences and rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.asr.dllm_asr.plain_denoise import denoise
from tokenthrift.backbones.samplers import Canvas, PriorGuidedSampler, TokenIds, sample
from tokenthrift.budget import DecodeBudget

VOCAB, EOS, DELETE, MASK = 9, 6, 7, 8


@pytest.mark.parametrize("prune", ["every", "first", "never"])
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    verify=st.sampled_from([None, 0.05, 0.4]),
    recheck=st.booleans(),
    most=st.sampled_from([None, 1, 2, 4]),
)
def test_it_decodes_as_dllm_asr_does(
    prune: Any, seed: int, lengths: list[int], verify: float | None, recheck: bool, most: int | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCAB, 12, VOCAB, generator=generator, dtype=torch.float64) * 3
    width = max(1, *lengths)
    ids = torch.randint(0, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]

    def predict(now: Tensor, alive: Tensor, rows: Tensor) -> Tensor:
        del alive, rows
        own = table[now, torch.arange(now.shape[1])]
        return own + torch.cat([torch.zeros_like(own[:, :1]), own[:, :-1]], 1)  # a slot sees the one before it

    recheck = recheck and verify is not None
    sampler = PriorGuidedSampler(threshold=0.7, prune=prune, verify_threshold=verify, verify_committed=recheck)
    tokens = TokenIds(MASK, EOS, delete=DELETE)
    done = sample(predict, Canvas(ids, mask), sampler, tokens, max_rounds=most)
    expected = denoise(
        predict,
        ids,
        mask,
        mask_id=MASK,
        eos_id=EOS,
        delete_id=DELETE,
        budget=DecodeBudget(max_rounds=most),
        threshold=0.7,
        prune=prune,
        verify_threshold=verify,
        verify_committed=recheck,
    )
    assert done.ids.tolist() == expected.ids.tolist()
    assert done.lengths.tolist() == expected.lengths.tolist()
    assert done.rounds.tolist() == expected.rounds.tolist()
    assert done.forwards == expected.forwards
    assert done.text_slots() == expected.text_slots()
    torch.testing.assert_close(done.confidence, expected.confidence, rtol=0, atol=1e-12, equal_nan=True)
