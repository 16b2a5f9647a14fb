"""The adapter: how many positions a recording becomes, and that neither neighbours nor padding matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenthrift.dllm_asr.adapter import Adapter
from tokenthrift.dllm_asr.config import AdapterConfig
from tokenthrift.dllm_asr.rates import adapted_length

RATES = st.builds(AdapterConfig, pool=st.integers(1, 4), stride=st.integers(1, 3))
few = settings(deadline=None, max_examples=25)


def batch(lengths: list[int], width: int = 6) -> tuple[Tensor, Tensor]:
    """States with NaN after the end of each recording, and their lengths."""
    states = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor(lengths)
    return states.masked_fill((torch.arange(max(lengths)) >= sizes[:, None])[..., None], torch.nan), sizes


def adapter(config: AdapterConfig) -> Adapter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Adapter(config, 6, 6 if config.stride == 1 else 10)


@given(RATES, st.lists(st.integers(1, 30), min_size=1, max_size=4))
@few
@torch.no_grad()
def test_a_row_of_a_batch_equals_the_row_alone_and_has_the_planned_length(
    config: AdapterConfig, lengths: list[int]
) -> None:
    model, (states, sizes) = adapter(config), batch(lengths)
    memory, mask = model(states, sizes)
    assert mask.sum(1).tolist() == [adapted_length(n, config) for n in lengths]
    assert memory.shape == (len(lengths), mask.shape[1], 6 if config.stride == 1 else 10)
    for row, n in enumerate(lengths):
        alone, alone_mask = model(states[row : row + 1, :n], sizes[row : row + 1])
        assert alone_mask.all()
        torch.testing.assert_close(memory[row][mask[row]], alone[0], rtol=0, atol=1e-5)


@given(RATES, st.integers(1, 1500))
@few
def test_every_started_run_of_states_is_a_position(config: AdapterConfig, states: int) -> None:
    length = adapted_length(states, config)
    assert 1 <= length <= states
    assert (length - 1) * config.pool * config.stride < states <= length * config.pool * config.stride
    assert adapted_length(states + 1, config) >= length


def test_the_last_window_averages_what_it_has() -> None:
    states = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, torch.nan, torch.nan]])[..., None]
    memory, mask = Adapter(AdapterConfig(pool=2, stride=1), 1, 1)(states, torch.tensor([5, 3]))
    assert memory[..., 0].tolist() == [[1.5, 3.5, 5.0], [1.5, 3.0, 0.0]]
    assert mask.sum(1).tolist() == [3, 2]


def test_ten_seconds_at_the_rates_of_the_paper() -> None:
    assert adapted_length(500, AdapterConfig(pool=2, stride=2)) == 125


def test_without_pooling_and_stride_states_pass_unchanged() -> None:
    states, lengths = batch([4, 4])
    memory, mask = adapter(AdapterConfig(pool=1, stride=1))(states, lengths)
    assert torch.equal(memory, states)
    assert mask.all()


@pytest.mark.parametrize("field", ["pool", "stride"])
@pytest.mark.parametrize("value", [0, 9])
def test_rates_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"adapter\.{field} must be between 1 and 8"):
        AdapterConfig(**{field: value})  # pools is no number
