"""KARL on image files, for `tokenthrift tokenize` and `tokenthrift plan`.

An image is brought to the model's size (its middle square), encoded, and decoded once to measure its error. With
`--verify` the check has measured it already.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, ItemSize, TokenBudget, TokenUsage
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.model import Karl
from tokenthrift.karl.verified import encode_verified, measure, verdict
from tokenthrift.media.image import image_size, read_image, square
from tokenthrift.media.suffixes import IMAGE_SUFFIXES
from tokenthrift.tokenize import USAGE_COLUMNS, Column, usage_row

__all__ = ["ImageFiles"]


class ImageFiles:
    """A `FileTokenizer` of images.

    Args:
        karl: the model.
        options: those of `add_options`, parsed.

    Raises:
        ValueError: the model's images are not square.
    """

    noun = "image"
    suffixes = IMAGE_SUFFIXES
    columns: ClassVar[Mapping[str, Column]] = {
        **USAGE_COLUMNS,
        "bits": "int",
        "result": "text",
        "decoder_passes": "int",
        "codes": "ints",
        "positions": "ints",
    }

    def __init__(self, karl: Karl, options: argparse.Namespace) -> None:
        height, width = karl.config.size
        if height != width:
            raise ValueError(f"files are read as squares; this model is trained on {height} x {width} pixels")
        self.karl, self.size, self.options = karl, height, options
        self.layout = None if karl.config.codebook_size is None else BitFormat.of(karl.config)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Adds what KARL can do besides."""
        group = parser.add_argument_group(
            "KARL models", "A budget without a target error (e0.05) uses all the tokens that it allows."
        )
        group.add_argument(
            "--max-bits", type=int, metavar="N", help="most bits of an image, as a byte string of its own"
        )
        group.add_argument(
            "--verify",
            action="store_true",
            help="decode and measure each image, and re-encode it if it misses its target",
        )
        group.add_argument(
            "--calibrated",
            action="store_true",
            help="use the model's calibration: misses are as rare as it was made for",
        )
        group.add_argument("--codes", action="store_true", help="write the tokens' codes and positions too")

    def plan(self, path: Path, budget: TokenBudget) -> TokenUsage:
        """See `FileTokenizer.plan`; images of every size cost the same."""
        image_size(path)
        (usage,) = self.karl.plan([ItemSize()], self._within_bits(budget))
        return usage

    def read(self, path: Path) -> Tensor:
        """`(3, size, size)` in [0, 1]."""
        return square(read_image(path), self.size)

    def tokenize(self, items: Sequence[Tensor], budget: TokenBudget) -> list[dict[str, Any]]:
        """See `FileTokenizer.tokenize`: native, cap, tokens, error; bits, result and codes where there are any."""
        budget, options = self._within_bits(budget), self.options
        images = torch.stack(list(items)).to(self.karl.to_tokens.weight.device)
        if options.verify:
            tokens = encode_verified(self.karl, images, budget, calibrated=options.calibrated)
            errors = [usage.error for usage in tokens.usage]
        else:
            tokens = self.karl.encode(images, budget, calibrated=options.calibrated)
            errors = measure(self.karl, images, tokens).tolist()
        rows = []
        for i, (usage, error) in enumerate(zip(tokens.usage, errors, strict=True)):
            row = usage_row(replace(usage, error=error))
            if self.layout is not None:
                row["bits"] = self.layout.string_bits([usage.used])
            if options.verify:
                row |= {"result": verdict(usage, budget), "decoder_passes": usage.rounds}
            if options.codes and tokens.codes is not None:
                row["codes"] = tokens.codes[i][tokens.mask[i]].tolist()
                if not self.karl.support.nested:
                    row["positions"] = tokens.positions[i][tokens.mask[i]].tolist()
            rows.append(row)
        return rows

    def _within_bits(self, budget: TokenBudget) -> TokenBudget:
        if self.options.max_bits is None:
            return budget
        if self.layout is None:
            raise BudgetError("bits of continuous tokens", "a model with a token codebook", "max_tokens")
        most = self.layout.tokens_within(self.options.max_bits)
        return replace(budget, max_tokens=most if budget.max_tokens is None else min(most, budget.max_tokens))
