"""Dropped tokens that cost nothing: images of nearly equal length are decoded together, so that little is padding.

Source: KARL (arXiv 2507.07995) masks halted tokens and always computes all positions. A masked token changes nothing
that is kept, so taking it out gives the same images, provided that the others keep the position they had.

What differs: images are sorted by their count and cut into groups of nearly equal count; an image's result does not
depend on its group.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["groups"]


def groups(counts: Sequence[int], fixed: int, waste: float = 0.02) -> list[list[int]]:
    """Rows that are worth computing together.

    Args:
        counts: kept tokens of every image.
        fixed: positions that every image has besides.
        waste: largest share of padding in a group.

    Returns:
        Lists of row numbers, each row in one of them, of similar counts, the longest row of each first.
    """
    out: list[list[int]] = []
    padded = real = 0
    for row in sorted(range(len(counts)), key=lambda i: -counts[i]):
        length = fixed + counts[row]
        longest = fixed + counts[out[-1][0]] if out else 0
        if out and (padded + longest) - (real + length) <= waste * (padded + longest):
            out[-1].append(row)
            padded, real = padded + longest, real + length
        else:
            out.append([row])
            padded = real = length
    return out
