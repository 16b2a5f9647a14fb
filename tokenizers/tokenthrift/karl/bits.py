"""A budget in bits, and the byte string that keeps to it.

Source: KARL (arXiv 2507.07995) counts tokens and nothing else. Its kept tokens may be any subset, so a decoder also
needs the list of which: at 32 of 256 tokens, a third more than the codes alone take, if that list is coded well. With
prefix halting (`KarlConfig.halting`) a count is enough. Everything a decoder needs is in the string and is counted.

The string: a byte for the version and kind; the number of images (7 bits a byte, high bit: more follow); rows and
columns of their grid, likewise, where it is not the one that the model is trained on; the images one after the other
without alignment; zeros up to a whole byte; and a CRC-16 of it all that starts from the model's sizes, so that a string
of another kind of model does not pass. An image is its number of tokens minus 1, for subset halting a bit for each
native token, and the codes. Continuous tokens have no codes, hence no bits.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenthrift.budget import BudgetError
from tokenthrift.karl.config import KarlConfig

__all__ = ["BitFormat", "BitStringError", "read_codes", "write_codes"]

_VERSION: Final = 1
_SUBSET: Final = 0x80
_GRID: Final = 0x40
_FRAME_BYTES: Final = 3  # version and checksum

Bits = NDArray[np.uint8]


class BitStringError(ValueError):
    """A byte string that is damaged, cut short, or not one of this kind of model."""


@dataclass(frozen=True, slots=True)
class BitFormat:
    """How an image of a model is written.

    Attributes:
        codebook_size: entries of the codebook.
        native: most tokens of an image.
        prefix: whether the kept tokens are always the first ones.
    """

    codebook_size: int
    native: int
    prefix: bool

    @classmethod
    def of(cls, config: KarlConfig) -> BitFormat:
        """The format of a model.

        Raises:
            BudgetError: its tokens are continuous.
        """
        if config.codebook_size is None:
            raise BudgetError("bits of continuous tokens", "a model with a token codebook", "max_tokens")
        return cls(config.codebook_size, config.max_tokens, config.halting == "prefix")

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return (self.codebook_size - 1).bit_length()

    @property
    def length_bits(self) -> int:
        """Bits that say which tokens there are, whatever their number."""
        return (self.native - 1).bit_length() + (0 if self.prefix else self.native)

    def image_bits(self, tokens: int) -> int:
        """Bits of one image, its share of the string's frame not included."""
        return self.length_bits + tokens * self.code_bits

    def string_bits(self, counts: Sequence[int], grid: tuple[int, int] | None = None) -> int:
        """Bits of the whole byte string of images with these token counts; a grid as in `write_codes`."""
        body = sum(map(self.image_bits, counts))
        return 8 * (_FRAME_BYTES + sum(map(len, map(_varint, (len(counts), *(grid or ()))))) + (body + 7) // 8)

    def tokens_within(self, bits: int) -> int:
        """The most tokens for which the string of one image takes no more than `bits`.

        Raises:
            BudgetError: not even one token fits.
        """
        body = bits // 8 * 8 - 8 * (_FRAME_BYTES + 1)
        tokens = min(self.native, (body - self.length_bits) // self.code_bits)
        if tokens < 1:
            least = self.string_bits([1])
            raise BudgetError(f"a budget of {bits} bits", f"at least {least} bits, one token", f"{least} bits")
        return tokens


def write_codes(codes: Tensor, positions: Tensor, layout: BitFormat, grid: tuple[int, int] | None = None) -> bytes:
    """The byte string of a batch.

    Args:
        codes: `(B, N)` int64, -1 in padding.
        positions: `(B, N)` int64, of each token, ascending; -1 in padding.
        layout: of the model.
        grid: rows and columns of the images, to be written too.

    Raises:
        ValueError: an image without tokens, a code or position out of range, or with a prefix layout, not a prefix.
    """
    pieces: list[Bits] = []
    for row, places in zip(codes.cpu().numpy(), positions.cpu().numpy(), strict=True):
        values, where = row[row >= 0], places[row >= 0]
        if not 1 <= len(values) <= layout.native or values.max() >= layout.codebook_size:
            raise ValueError(
                f"an image needs 1 to {layout.native} codes below {layout.codebook_size}, not {values.tolist()}"
            )
        if (where[:-1] >= where[1:]).any() or where[0] < 0 or where[-1] >= layout.native:
            raise ValueError(f"positions must ascend within 0..{layout.native - 1}, not {where.tolist()}")
        pieces.append(_to_bits(np.array([len(values) - 1]), (layout.native - 1).bit_length()))
        if not layout.prefix:
            mask = np.zeros(layout.native, dtype=np.uint8)
            mask[where] = 1
            pieces.append(mask)
        elif where[-1] != len(where) - 1:
            raise ValueError(f"with prefix halting the kept tokens are the first ones, not {where.tolist()}")
        pieces.append(_to_bits(values, layout.code_bits))
    body = np.packbits(np.concatenate(pieces)).tobytes() if pieces else b""
    kind = _VERSION | (0 if layout.prefix else _SUBSET) | (_GRID if grid else 0)
    frame = bytes([kind]) + b"".join(map(_varint, (len(codes), *(grid or ())))) + body
    return frame + _checksum(frame, layout).to_bytes(2, "big")


def read_codes(data: bytes, layout: BitFormat) -> tuple[list[list[int]], list[list[int]], tuple[int, int] | None]:
    """The reverse of `write_codes`.

    Returns:
        Codes and positions of each image, as `Karl.from_codes` takes them, and the grid if it was written.

    Raises:
        BitStringError: the string is damaged, cut short, or of another kind of model.
    """
    if len(data) < _FRAME_BYTES + 1:
        raise BitStringError(f"a string of {len(data)} bytes holds no tokens")
    if (version := data[0] & ~(_SUBSET | _GRID)) != _VERSION:
        raise BitStringError(f"version {version} of the format; this release reads version {_VERSION}")
    frame = data[:-2]
    if _checksum(frame, layout) != int.from_bytes(data[-2:], "big") or bool(data[0] & _SUBSET) == layout.prefix:
        raise BitStringError("the checksum does not match: damaged, cut short, or written by another kind of model")
    count, start = _read_varint(frame, 1)
    grid = None
    if data[0] & _GRID:
        rows, start = _read_varint(frame, start)
        columns, start = _read_varint(frame, start)
        grid = (rows, columns)
    bits = np.unpackbits(np.frombuffer(frame, dtype=np.uint8)[start:])
    codes: list[list[int]] = []
    positions: list[list[int]] = []
    at = 0
    for _ in range(count):
        (length,), at = _from_bits(bits, at, 1, (layout.native - 1).bit_length())
        where = np.arange(int(length) + 1)
        if not layout.prefix:
            mask, at = _from_bits(bits, at, layout.native, 1)
            where = np.flatnonzero(mask)
        values, at = _from_bits(bits, at, int(length) + 1, layout.code_bits)
        if len(where) != len(values) or values.max() >= layout.codebook_size or where[-1] >= layout.native:
            raise BitStringError("an image's length, positions and codes do not fit together")
        codes.append(values.tolist())
        positions.append(where.tolist())
    if len(bits) - at >= 8 or bits[at:].any():
        raise BitStringError("more data than the images that the string announces")
    return codes, positions, grid


def _to_bits(values: NDArray[np.int64], width: int) -> Bits:
    shifts = np.arange(width - 1, -1, -1)
    return ((values[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)


def _from_bits(bits: Bits, at: int, count: int, width: int) -> tuple[NDArray[np.int64], int]:
    """`count` numbers of `width` bits from bit `at`, and the bit after them."""
    end = at + count * width
    if end > len(bits):
        raise BitStringError("fewer data than the images that the string announces")
    weights = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
    return bits[at:end].reshape(count, width).astype(np.int64) @ weights, end


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _read_varint(frame: bytes, start: int) -> tuple[int, int]:
    """A number from byte `start`, and the byte after it."""
    number = 0
    for group, byte in enumerate(frame[start : start + 5]):
        number |= (byte & 0x7F) << 7 * group
        if byte < 0x80:
            return number, start + group + 1
    raise BitStringError("a number of the frame has no end")


def _checksum(frame: bytes, layout: BitFormat) -> int:
    model = layout.codebook_size.to_bytes(4, "big") + layout.native.to_bytes(4, "big")
    return binascii.crc_hqx(frame, binascii.crc_hqx(model, 0xFFFF))
