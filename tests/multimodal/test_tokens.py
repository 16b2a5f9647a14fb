"""TokenBatch: what it checks, and how items become a batch and come back."""

import pytest
import torch
from torch import Tensor

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
