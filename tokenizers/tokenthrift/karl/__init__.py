"""Adaptive image tokens: as many as an image's content needs for a wanted error (KARL, arXiv 2507.07995).

model      `Karl`: encode under a budget, decode
config     `KarlConfig`, and the paper's sizes by name
vqgan, autoencoder_kl, convolution   the base tokenizers: an image to a grid of features and back
latent, transformer, conditioning, halting, quantizer, packing   the parts, an idea each
guarantee, calibration, bits   promises: a measured error, a miss rate, a number of bits
tokens_to_llm   the tokens as a prefix of a language model
module, base_module   training under Lightning, with losses, curriculum, discriminator, optimisation
data       `KarlDataModule`
evaluate   quality against tokens, with metrics, sweeps, complexity, plots
convert    the published checkpoints, and ours, to a model's folder
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.karl.training.base_tokenizer import KarlBaseModule
    from tokenthrift.karl.config import KarlConfig
    from tokenthrift.karl.training.data import KarlDataModule
    from tokenthrift.karl.model import Karl
    from tokenthrift.karl.training.module import KarlStage1Module, KarlStage2Module

__all__ = ["Karl", "KarlBaseModule", "KarlConfig", "KarlDataModule", "KarlStage1Module", "KarlStage2Module"]

_HOMES = {
    "Karl": "model",
    "KarlBaseModule": "base_module",
    "KarlConfig": "config",
    "KarlDataModule": "data",
    "KarlStage1Module": "module",
    "KarlStage2Module": "module",
}


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for: the command line needs no torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.karl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
