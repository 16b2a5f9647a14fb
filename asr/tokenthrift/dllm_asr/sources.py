"""Fills the parts of a dLLM-ASR model whose weights lie elsewhere: encoder and language model.

Source: dLLM-ASR (arXiv 2601.17902) freezes both. What differs: the model's folder names them and holds what was trained
alone, adapter, draft head and low-rank adapters. The head of casing and punctuation, which is not in the paper, is
trained last and on states of all the rest: it lies in a file of its own, so that the other weights stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

from safetensors import safe_open
from torch import Tensor

from tokenthrift.dllm_asr.language_model import external_parts
from tokenthrift.dllm_asr.step_audio import step_audio_encoder, step_audio_frontend
from tokenthrift.external import allow_missing, assign_state, drop_external_keys, resolved
from tokenthrift.sources import fetch_weights
from tokenthrift.whisper import encoder_weights

__all__ = ["PUNCTUATION", "fill_external", "leave_out_external", "miss_external"]

PUNCTUATION: Final = "punctuation.safetensors"


def fill_external(model: Any, base_dir: Path | None = None, **options: Any) -> None:
    """Fills what the configuration names by folder or Hub id.

    Args:
        model: a `DllmAsr`; its external parts may lie on the meta device.
        base_dir: where a relative folder is looked for first.
        options: of `sources.fetch`.

    Raises:
        SourceError, WeightsError: a name leads nowhere, or to other tensors.
    """
    for part, named in external_parts(model.config).items():
        source = resolved(named, base_dir)
        if part == "backbone.lm":
            from tokenthrift.backbones.families import backbone_state

            state = backbone_state(cast(Any, model.config.backbone.family), source, **options)
            assign_state(model.backbone.lm, state, named)
        elif part == "adapter.frontend":
            state = _tensors(source, ("encoder.after_norm.", "adapter."), options)
            assign_state(model.adapter.frontend, step_audio_frontend(state), named)
        elif model.config.encoder.kind == "step_audio":
            encoder = step_audio_encoder(_tensors(source, "encoder.", options))
            positions = encoder.pop("positions", model.encoder.positions)
            assign_state(model.encoder, encoder, named)
            model.encoder.positions = positions.to(model.encoder.positions)
        else:
            assign_state(model.encoder, encoder_weights(_tensors(source, "model.encoder.", options)), named)


def leave_out_external(model: Any, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """A hook after `state_dict`: what lies elsewhere is not in the model's file of weights."""
    drop_external_keys((*external_parts(model.config), "punctuation"), model, state, prefix, metadata)


def miss_external(model: Any, incompatible: Any) -> None:
    """A hook after `load_state_dict`: what lies elsewhere is not missing."""
    allow_missing((*external_parts(model.config), "punctuation"), model, incompatible)


def _tensors(source: str | Path, prefix: str | tuple[str, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in one file or in shards, whose names begin so."""
    found: dict[str, Tensor] = {}
    for path in fetch_weights(source, prefix, **options):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    return found
