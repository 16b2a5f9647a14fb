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


def tiny_config(kind: Literal["vqgan", "vae"] = "vqgan", codebook_size: int | None = 32, **changes: Any) -> KarlConfig:
    """The configuration; changes replace fields."""
    config = KarlConfig(
        base=BaseConfig(
            kind=kind,
            channels=8,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            latent_channels=8,
            norm_num_groups=4,
            codebook_size=16,
        ),
        encoder=TransformerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
        decoder=TransformerConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2),
        grid=(4, 6),
        max_tokens=TOKENS,
        max_position_embeddings=TOKENS,
        codebook_size=codebook_size,
    )
    return replace(config, **changes)


def released_config(kind: Literal["vqgan", "vae"] = "vqgan", codebook_size: int | None = 32) -> KarlConfig:
    """The same size, computing as published."""
    rule: dict[str, Any] = {"latent_attention": None, "halting": None}
    return tiny_config(kind, codebook_size, compat="released", released_table=8, **rule)


def tiny_karl(config: KarlConfig | None = None, *, decisive: bool = False) -> Karl:
    """A model in evaluation mode, the same every time.

    Args:
        config: `tiny_config()` if not given.
        decisive: images that depend on their tokens, and halting logits of mean 0 and deviation 1, other ones from
            token to token, image to image and error to error, in place of all near 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Karl(config or tiny_config())
        if decisive:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.startswith("decoder.") and parameter.ndim > 1:
                        parameter.normal_(std=0.2)
                    if name.startswith(("encoder.", "halting.")) and parameter.ndim > 1:
                        parameter.normal_(std={"queries": 2.0, "error": 0.2}.get(name.split(".")[1], 0.4))
                images = pictures(4)
                features, counts = model.base.encode(images), torch.full((4,), model.config.max_tokens)
                logits = model.encode_latents(
                    images, features, counts, torch.tensor([0.01, 0.05, 0.12, 0.38])
                ).halting_logits
                last = model.halting.mlp.get_submodule("2")
                last.get_parameter("weight").div_(logits.std())
                last.get_parameter("bias").fill_(-float(logits.mean() / logits.std()))
    return model


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Images of growing contrast, `(count, 3, H, W)` in [0, 1]."""
    noise = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))
    contrast = torch.linspace(0.2, 1.0, count)[:, None, None, None]
    return 0.5 + (noise - 0.5) * contrast
