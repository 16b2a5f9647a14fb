"""Adaptive image tokens: as many as an image's content needs for a wanted error (KARL, arXiv 2507.07995).

model      `Karl`: encode under a budget, decode
config     `KarlConfig`, and the paper's sizes by name
vqgan, autoencoder_kl, convolution   the base tokenizers: an image to a grid of features and back
transformer, conditioning, halting, quantiser, packing   the parts, an idea each
convert    the published checkpoints, and ours, to a model's folder
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.karl.config import KarlConfig
    from tokenthrift.karl.model import Karl

__all__ = ["Karl", "KarlConfig"]

_HOMES = {"Karl": "model", "KarlConfig": "config"}


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for: the command line needs no torch."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.karl.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
