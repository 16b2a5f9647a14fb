"""Karl models small enough for tests: random weights, 16 x 24 pixels, a grid of 4 x 6, at most 12 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokenthrift.karl.config import BaseConfig, KarlConfig, TransformerConfig
from tokenthrift.karl.model import Karl

SIZE = (16, 24)
TOKENS = 12


def tiny_config(kind: Literal["vqgan", "vae"] = "vqgan", codes: int | None = 32, **changes: Any) -> KarlConfig:
    """The configuration; changes replace fields."""
    config = KarlConfig(
        base=BaseConfig(kind=kind, channels=8, multipliers=(1, 2, 2), blocks=1, latent=8, groups=4, codes=16),
        encoder=TransformerConfig(width=32, layers=2, heads=2),
        decoder=TransformerConfig(width=24, layers=2, heads=2),
        grid=(4, 6),
        max_tokens=TOKENS,
        table=TOKENS,
        codes=codes,
    )
    return replace(config, **changes)


def released_config(kind: Literal["vqgan", "vae"] = "vqgan", codes: int | None = 32) -> KarlConfig:
    """The same size, computing as published."""
    changes: dict[str, Any] = {"latent_attention": "full", "halting": "subset", "released_table": 8}
    return tiny_config(kind, codes, compat="released", **changes)


def tiny_karl(config: KarlConfig | None = None, *, decisive: bool = False) -> Karl:
    """A model in evaluation mode, the same every time.

    Args:
        config: `tiny_config()` if not given.
        decisive: halting probabilities all over [0, 1], also from token to token, in place of all near one half.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Karl(config or tiny_config()).eval()
        if decisive:
            with torch.no_grad():
                model.halting.mlp[0].weight.normal_()
                model.halting.mlp[2].weight.normal_()
                model.encoder.queries.normal_()
    return model


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Images of growing contrast, `(count, 3, H, W)` in [0, 1]."""
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    contrast = torch.linspace(0.2, 1.0, count)[:, None, None, None]
    return 0.5 + (noise - 0.5) * contrast
