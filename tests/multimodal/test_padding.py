"""Rows of unequal length: masks, padding, packing and gathering, on both sides and with NaN in padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenthrift.padding import gather_rows, length_mask, pack, pad_rows, unpad_rows
from tokenthrift.reducers.pooling import pool_by_rate

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)
QUICK = settings(deadline=None, max_examples=50)


def test_length_mask() -> None:
    assert length_mask([0, 2]).tolist() == [[False, False], [True, True]]
    assert length_mask(torch.tensor([1]), 3).tolist() == [[True, False, False]]
    assert length_mask([]).shape == (0, 0)


@QUICK
@given(lengths=LENGTHS, left=st.booleans(), wide=st.booleans())
def test_rows_come_back(lengths: list[int], left: bool, wide: bool) -> None:
    rows = [torch.randn(n, 3) if wide else torch.randn(n) for n in lengths]
    padded, mask = pad_rows(rows, "left" if left else "right", float("nan"))
    assert mask.sum(1).tolist() == lengths
    assert all(torch.equal(a, b) for a, b in zip(unpad_rows(padded, mask), rows, strict=True))
    assert padded[~mask].isnan().all()


@QUICK
@given(rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_packing_keeps_the_order_of_what_is_real(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    states = torch.randn(*mask.shape, 2)
    packed, kept = pack(states, mask)
    assert kept.shape[1] == int(mask.sum(1).max())
    assert torch.equal(kept, length_mask(mask.sum(1), kept.shape[1]))
    for ours, wanted in zip(unpad_rows(packed, kept), unpad_rows(states, mask), strict=True):
        assert torch.equal(ours, wanted)


def test_padding_is_zero_on_the_right_and_nothing_packs_to_nothing() -> None:
    padded, mask = pad_rows([torch.ones(1), torch.ones(2)])
    assert padded.tolist() == [[1, 0], [1, 1]]
    assert mask.tolist() == [[True, False], [True, True]]
    states, kept = pack(torch.ones(0, 3, 2), torch.ones(0, 3, dtype=torch.bool))
    assert states.shape == (0, 0, 2)
    assert kept.shape == (0, 0)


def test_gathering_rows_of_any_rank() -> None:
    index = torch.tensor([[2, 0], [1, 1]])
    for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5)):
        states = torch.randn(shape)
        assert torch.equal(gather_rows(states, index), torch.stack([states[0, [2, 0]], states[1, [1, 1]]]))


@pytest.mark.parametrize("mode", ["average", "stack"])
@QUICK
@given(lengths=LENGTHS.filter(any), rate=st.integers(1, 7), extra=st.integers(0, 9), whole=st.booleans())
def test_pooling_by_rate_reads_no_padding_and_no_neighbor(
    mode: str, lengths: list[int], rate: int, extra: int, whole: bool
) -> None:
    rows = [torch.randn(n, 2) for n in lengths]
    padded, mask = pad_rows([*rows, torch.zeros(max(lengths) + extra, 2)], value=float("nan"))
    counts = mask.sum(1)
    tokens, made = pool_by_rate(padded, counts, rate, mode, whole_windows=whole)  # type: ignore[arg-type]
    for i, states in enumerate(rows):
        windows = [w for w in states.split(rate) if len(w) == rate or (not whole and len(w))]
        assert int(made[i]) == len(windows)
        if mode == "average":
            wanted = [window.mean(0) for window in windows]
        else:
            wanted = [torch.cat([w, torch.zeros(rate - len(w), 2)]).flatten() for w in windows]
        for got, want in zip(tokens[i, : len(windows)], wanted, strict=True):
            torch.testing.assert_close(got, want)
        assert not tokens[i, len(windows) :].any()


def test_the_rest_of_the_states_is_kept_unless_whole_windows_are_asked_for() -> None:
    states = torch.arange(10.0)[None, :, None]
    tokens, counts = pool_by_rate(states, torch.tensor([10]), 4)
    assert (tokens.flatten().tolist(), counts.tolist()) == ([1.5, 5.5, 8.5], [3])
    tokens, counts = pool_by_rate(states, torch.tensor([10]), 4, whole_windows=True)
    assert (tokens.flatten().tolist(), counts.tolist()) == ([1.5, 5.5], [2])


def test_a_rate_below_one_raises() -> None:
    with pytest.raises(ValueError, match="from 1, not 0"):
        pool_by_rate(torch.zeros(1, 2, 2), torch.tensor([2]), 0)
