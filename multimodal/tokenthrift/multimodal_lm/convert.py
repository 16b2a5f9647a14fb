"""A training checkpoint of a `MultimodalLM` as a model: its projectors and adapters, and the names of the rest.

Published models of this kind store the language model again (LLaVA); here the folder names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokenthrift.config import from_plain
from tokenthrift.multimodal_lm.config import MultimodalConfig
from tokenthrift.multimodal_lm.model import MultimodalLM
from tokenthrift.sources import fetch
from tokenthrift.training.start_weights import StartWeights, load_start_weights, read_start_weights

__all__ = ["multimodal"]


def multimodal(files: Sequence[str | Path]) -> MultimodalLM:
    """The model of a checkpoint that `tokenthrift fit --config recipes/multimodal/tiny.yaml` wrote.

    Args:
        files: one checkpoint.

    Raises:
        ValueError: several files, or a checkpoint of another training.
    """
    if len(files) != 1:
        raise ValueError(f"one checkpoint makes a model, not {len(files)} files")
    found = read_start_weights(files[0])
    options: dict[str, Any] = found.options
    if not {"config", "language_model"} <= set(options):
        raise ValueError(f"{files[0]} is no checkpoint of a MultimodalModule")
    named = options["language_model"]
    tokenizer = Tokenizer.from_file(str(fetch(named, ("tokenizer.json",)) / "tokenizer.json"))
    model = MultimodalLM(from_plain(MultimodalConfig, options["config"]), tokenizer)
    own = {name.removeprefix("model."): tensor for name, tensor in found.tensors.items() if name.startswith("model.")}
    load_start_weights(model, StartWeights(own, {}, {}), allow_missing=False)
    return model
