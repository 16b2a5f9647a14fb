"""TokenBatch: what it checks, and how items become a batch and come back."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokenthrift.budget import ItemSize
from tokenthrift.padding import pad_rows
from tokenthrift.tokens import TokenBatch


def test_items_round_trip_through_padding() -> None:
    items = [torch.randn(n, 3) for n in (2, 0, 5)]
    batch = TokenBatch.from_items(items, seconds=[1.0, 0.0, 2.5])
    assert batch.embeddings.shape == (3, 5, 3)
    assert all(torch.equal(a, b) for a, b in zip(batch.items(), items, strict=True))
    assert batch.positions.tolist() == [[0, 1, -1, -1, -1], [-1] * 5, [0, 1, 2, 3, 4]]
    assert [u.native for u in batch.usage] == [u.used for u in batch.usage] == [2, 0, 5]
    assert batch.seconds == (1.0, 0.0, 2.5)


def test_positions_count_real_tokens_on_either_side_of_the_padding() -> None:
    mask = torch.tensor([[False, False, True, True], [True, False, False, True]])
    batch = TokenBatch.from_embeddings(torch.zeros(2, 4, 1), mask)
    assert batch.positions.tolist() == [[-1, -1, 0, 1], [0, -1, -1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(2, 4)}, "embeddings must be"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, "mask must be"),
        ({"positions": torch.zeros(1, 4, dtype=torch.long)}, "positions must be"),
        ({"codes": torch.zeros(2, 4, 1)}, "codes must be"),
        ({"usage": ()}, "2 items but 0 entries in usage"),
        ({"seconds": (1.0,)}, "2 items but 1 entries in seconds"),
    ],
)
def test_fields_that_do_not_fit_raise(change: dict[str, Tensor], message: str) -> None:
    whole = TokenBatch.from_embeddings(torch.zeros(2, 4, 1))
    fields = {name: getattr(whole, name) for name in ("embeddings", "mask", "positions", "codes", "usage", "seconds")}
    with pytest.raises(ValueError, match=message):
        TokenBatch(**(fields | change))


def full_batch(left: bool = False) -> TokenBatch:
    """Two items of 3 and 5 tokens with everything a batch can know, padding on either side."""
    items = [torch.arange(3.0 * n).reshape(n, 3) + 1 for n in (3, 5)]
    embeddings, mask = pad_rows(items, "left" if left else "right", float("nan"))
    batch = TokenBatch.from_embeddings(embeddings, mask, [0.5, 2.0], [(3, 1, 1), (5, 1, 1)])
    return replace(batch, codes=(batch.positions * 7).masked_fill(~mask, -1), sizes=mask.float())


def test_sizes_are_what_a_plan_needs() -> None:
    assert full_batch().item_sizes() == [
        ItemSize(native=3, seconds=0.5, frames=3, height=1, width=1),
        ItemSize(native=5, seconds=2.0, frames=5, height=1, width=1),
    ]
    assert TokenBatch.from_items([torch.zeros(4, 2)]).item_sizes() == [ItemSize(native=4)]


@pytest.mark.parametrize("left", [False, True])
def test_first_tokens_are_the_first_real_ones(left: bool) -> None:
    batch = full_batch(left)
    few = batch.first([4, 2])
    assert few.mask.tolist() == [[True] * 3, [True, True, False]]
    assert few.positions.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert few.codes is not None
    assert few.codes.tolist() == [[0, 7, 14], [0, 7, -1]]
    assert [torch.equal(a, b[:n]) for a, b, n in zip(few.items(), batch.items(), (3, 2), strict=True)] == [True, True]
    assert [(u.native, u.cap, u.used) for u in few.usage] == [(3, 3, 3), (5, 2, 2)]
    assert [u.used for u in batch.first(1).usage] == [1, 1]
    assert few.sizes is not None
    assert few.sizes.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    measured = replace(batch, usage=tuple(replace(u, error=0.1) for u in batch.usage))
    assert [u.error for u in measured.first([3, 4]).usage] == [0.1, None]  # that of all tokens
    assert batch.first(0).mask.shape == (2, 0)
    for counts in ([1], [1, 2, 3], [3, -1]):
        with pytest.raises(ValueError, match="one count"):
            batch.first(counts)


def test_items_are_selected_in_order_and_more_than_once() -> None:
    batch = full_batch()
    picked = batch.select([1, 0, 1])
    assert [u.native for u in picked.usage] == [5, 3, 5]
    assert picked.seconds == (2.0, 0.5, 2.0)
    assert picked.grids == ((5, 1, 1), (3, 1, 1), (5, 1, 1))
    assert picked.codes is not None
    assert picked.sizes is not None
    assert picked.codes[1].tolist() == [0, 7, 14, -1, -1]
    assert picked.sizes[1].tolist() == [1, 1, 1, 0, 0]
    bare = TokenBatch.from_items([torch.zeros(2, 3)]).select([0])
    assert [getattr(bare, name) for name in ("codes", "sizes", "seconds", "grids")] == [None] * 4
    assert [getattr(bare.first(1), name) for name in ("codes", "sizes")] == [None] * 2
    assert torch.equal(picked.items()[0], batch.items()[1])
    assert torch.equal(picked.items()[1], batch.items()[0])


def test_batches_are_joined_and_taken_apart_again() -> None:
    batch = full_batch()
    wide = TokenBatch.cat([batch.select([0]).first(9), batch, full_batch(left=True)])
    assert wide.mask.shape == (5, 5)
    for got, wanted in zip(wide.items(), [batch.items()[0], *batch.items(), *batch.items()], strict=True):
        assert torch.equal(got, wanted)
    assert wide.seconds == (0.5, 0.5, 2.0, 0.5, 2.0)
    assert wide.codes is not None
    assert (wide.codes[~wide.mask] == -1).all()
    assert (wide.positions[~wide.mask] == -1).all()
    assert not wide.embeddings[0, 3:].any()
    assert wide.grids is None  # the first lost its grid
    plain = TokenBatch.from_items([torch.zeros(2, 3)])
    mixed = TokenBatch.cat([plain, batch])
    assert mixed.codes is None
    assert mixed.seconds is None
    assert mixed.sizes is not None
    assert mixed.sizes.sum(1).tolist() == [2, 3, 5]
    assert TokenBatch.cat([plain, plain]).sizes is None


def test_a_batch_moves_to_another_precision() -> None:
    half = full_batch().to(dtype=torch.float16)
    assert half.embeddings.dtype == torch.float16
    assert half.positions.dtype == torch.int64
    assert half.to("cpu").usage == full_batch().usage
