"""Byte strings of tokens: they round-trip, cost what is said, keep to a budget, and damage is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenizers.karl.tiny_karl import SIZE, pictures, tiny_config, tiny_karl
from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.karl import bits
from tokenthrift.karl.bits import BitFormat, BitStringError, read_codes, write_codes
from tokenthrift.karl.config import KarlConfig

formats = st.builds(BitFormat, st.integers(2, 5000), st.integers(1, 300), st.booleans())


@st.composite
def batches(draw: st.DrawFn) -> tuple[BitFormat, Tensor, Tensor]:
    layout = draw(formats)
    seed, images = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 5))
    random = torch.Generator().manual_seed(seed)
    codes, positions = torch.full((images, layout.native), -1), torch.full((images, layout.native), -1)
    for row in range(images):
        count = int(torch.randint(1, layout.native + 1, (1,), generator=random))
        where = torch.randperm(layout.native, generator=random)[:count].sort().values
        codes[row, :count] = torch.randint(layout.codebook_size, (count,), generator=random)
        positions[row, :count] = torch.arange(count) if layout.prefix else where
    width = int((codes >= 0).sum(1).max())
    return layout, codes[:, :width], positions[:, :width]


@settings(max_examples=40, deadline=None)
@given(batches())
def test_round_trip_at_the_stated_size(batch: tuple[BitFormat, Tensor, Tensor]) -> None:
    layout, codes, positions = batch
    data = write_codes(codes, positions, layout)
    assert 8 * len(data) == layout.string_bits((codes >= 0).sum(1).tolist())
    assert read_codes(data, layout) == (
        [row[row >= 0].tolist() for row in codes],
        [row[row >= 0].tolist() for row in positions],
        None,
    )
    grid = (3, 300)
    data = write_codes(codes, positions, layout, grid)
    assert 8 * len(data) == layout.string_bits((codes >= 0).sum(1).tolist(), grid)
    assert read_codes(data, layout)[2] == grid


@settings(max_examples=40, deadline=None)
@given(batches(), st.data())
def test_damage_is_found(batch: tuple[BitFormat, Tensor, Tensor], data: st.DataObject) -> None:
    layout, codes, positions = batch
    whole = write_codes(codes, positions, layout)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(BitStringError):
        read_codes(cut, layout)
    flipped = bytearray(whole)
    # A CRC finds every burst of up to its own length.
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BitStringError):
        read_codes(bytes(flipped), layout)
    with pytest.raises(BitStringError):
        read_codes(whole + b"\0", layout)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("size", [SIZE, (24, 32)])
def test_images_survive_the_byte_string(nested: bool, size: tuple[int, int]) -> None:
    config = tiny_config() if nested else tiny_config(latent_attention="full", halting="subset")
    karl = tiny_karl(config, decisive=True)
    tokens = karl.encode(pictures(3, size), TokenBudget(target_error=0.1, min_tokens=1))
    data = karl.to_bytes(tokens, size)
    counts = [usage.used for usage in tokens.usage]
    layout = BitFormat.of(karl.config)
    assert 8 * len(data) == layout.string_bits(counts, None if size == SIZE else (6, 8))
    again, stated = karl.from_bytes(data)
    assert stated == size
    assert [usage.used for usage in again.usage] == counts
    assert torch.equal(karl.decode(again, stated), karl.decode(tokens, size))


def test_continuous_tokens_have_no_byte_string() -> None:
    karl = tiny_karl(tiny_config(codebook_size=None))
    with pytest.raises(BudgetError, match="continuous"):
        karl.to_bytes(karl.encode(pictures(1)))
    with pytest.raises(ValueError, match="without codes"):
        tiny_karl().to_bytes(karl.encode(pictures(1)))


def test_another_model_does_not_read_it() -> None:
    layout = BitFormat(4096, 256, True)
    data = write_codes(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]), layout)
    for other in (BitFormat(2048, 256, True), BitFormat(4096, 128, True), BitFormat(4096, 256, False)):
        with pytest.raises(BitStringError, match="another kind of model"):
            read_codes(data, other)
    with pytest.raises(BitStringError, match="version 2"):
        read_codes(b"\x02" + data[1:], layout)


@settings(max_examples=50, deadline=None)
@given(formats, st.integers(0, 70_000))
def test_a_budget_is_kept_and_used(layout: BitFormat, limit: int) -> None:
    least = layout.string_bits([1])
    if limit < least:
        with pytest.raises(BudgetError, match=f"at least {least} bits"):
            layout.tokens_within(limit)
        return
    tokens = layout.tokens_within(limit)
    assert tokens >= 1
    assert layout.string_bits([tokens]) <= limit
    assert tokens == layout.native or layout.string_bits([tokens + 1]) > limit


def test_the_bits_of_a_token() -> None:
    layout = BitFormat.of(KarlConfig())
    assert (layout.code_bits, layout.length_bits) == (12, 8)
    assert layout.image_bits(32) == 8 + 12 * 32
    subset = BitFormat.of(replace(KarlConfig(), halting="subset"))
    assert subset.image_bits(32) == layout.image_bits(32) + 256
    with pytest.raises(BudgetError, match="continuous"):
        BitFormat.of(replace(KarlConfig(), codebook_size=None))


@pytest.mark.parametrize(
    ("codes", "positions", "prefix", "message"),
    [
        ([[-1, -1]], [[-1, -1]], True, "1 to 8 codes below 16, not"),
        ([[7, 16]], [[0, 1]], True, "1 to 8 codes below 16"),
        ([[1] * 9], [list(range(9))], True, "1 to 8 codes below 16"),
        ([[1, 2]], [[0, 2]], True, "the first ones"),
        ([[1, 2]], [[1, 0]], False, r"ascend within 0\.\.7"),
        ([[1, 2]], [[3, 3]], False, "ascend"),
        ([[1, 2]], [[-2, 3]], False, "ascend"),
        ([[3]], [[8]], False, "ascend"),
    ],
)
def test_what_cannot_be_written(codes: list[list[int]], positions: list[list[int]], prefix: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_codes(torch.tensor(codes), torch.tensor(positions), BitFormat(16, 8, prefix))


def test_the_extremes_can_be_written() -> None:
    layout = BitFormat(16, 8, False)
    for codes, positions in (([[15]], [[7]]), ([[0] * 8], [list(range(8))]), ([[0, 15]], [[0, 7]])):
        data = write_codes(torch.tensor(codes), torch.tensor(positions), layout)
        assert read_codes(data, layout) == (codes, positions, None)


def test_a_string_that_is_too_short_for_a_frame() -> None:
    for length in range(4):
        with pytest.raises(BitStringError, match=f"a string of {length} bytes holds no tokens"):
            read_codes(b"\x01" * length, BitFormat(16, 8, True))
    with pytest.raises(BitStringError, match="checksum"):
        read_codes(b"\x01" * 4, BitFormat(16, 8, True))


def sealed(frame: bytes, layout: BitFormat) -> bytes:
    """A frame with the checksum that belongs to it, whatever it holds."""
    return frame + bits._checksum(frame, layout).to_bytes(2, "big")


def test_strings_with_a_right_checksum_are_still_checked() -> None:
    layout = BitFormat(10, 6, True)
    one = write_codes(torch.tensor([[9, 3]]), torch.tensor([[0, 1]]), layout)[:-2]
    assert read_codes(sealed(one, layout), layout)[0] == [[9, 3]]
    too_many = bytes([one[0], 2]) + one[2:]
    for frame, message in (
        (one + b"\x00", "more data"),
        (one[:-1] + bytes([one[-1] | 1]), "more data"),
        (too_many, "fewer data"),
        (one[:1] + b"\x80\x80\x80\x80\x80\x01" + one[2:], "has no end"),
        # Length 2 in three bits, then the codes 9 and 10, of which the largest is 9.
        (bytes([one[0], 1, 0b001_1001_1, 0b010_00000]), "do not fit together"),
        # Length 7 where an image has at most 6 tokens.
        (bytes([one[0], 1, 0b110_0000_0, 0, 0, 0]), "do not fit together"),
    ):
        with pytest.raises(BitStringError, match=message):
            read_codes(sealed(frame, layout), layout)
    whole = BitFormat(16, 16, True)  # four bits of length and four of one code: a byte without padding
    full = write_codes(torch.tensor([[3]]), torch.tensor([[0]]), whole)[:-2]
    with pytest.raises(BitStringError, match="more data"):
        read_codes(sealed(full + b"\x00", whole), whole)
    subset = BitFormat(10, 6, False)
    two = write_codes(torch.tensor([[9, 3]]), torch.tensor([[0, 5]]), subset)[:-2]
    fewer_positions = bytes([two[0], 1, two[2] ^ 0b000_10000, *two[3:]])
    with pytest.raises(BitStringError, match="do not fit together"):
        read_codes(sealed(fewer_positions, subset), subset)


def test_numbers_of_the_frame_may_take_several_bytes() -> None:
    layout = BitFormat(16, 2, True)
    for count in (127, 128, 300):
        data = write_codes(torch.ones(count, 1, dtype=torch.long), torch.zeros(count, 1, dtype=torch.long), layout)
        assert 8 * len(data) == layout.string_bits([1] * count)
        assert len(read_codes(data, layout)[0]) == count
