"""The authors' checkpoint of dLLM-ASR to a model folder: `tokenthrift convert dllm_asr epoch_5_step_450000.pt OUT`.

Source: dLLM-ASR (arXiv 2601.17902), released weights: a linear layer from Step-Audio's 3584 to LLaDA's 4096 and PEFT's
low-rank adapters (r=16, alpha=32) in LLaDA-8B-Instruct, on q_proj, k_proj, v_proj and up_proj alone: the other names of
the authors' list are not LLaDA's. Encoder and language model are frozen and not in the file, so the folder names them.

Differs from the released code, which unpickles the file: only tensors are read, and every name and size is checked. The
file has no CTC branch, so decoding starts from nothing but MASK, as the released script does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from tokenthrift.backbones.shape import BackboneShape
from tokenthrift.dllm_asr.config import (
    AdapterConfig,
    BackboneConfig,
    DecodeConfig,
    DllmAsrConfig,
    DraftConfig,
    EncoderConfig,
    LoraConfig,
)
from tokenthrift.dllm_asr.language_model import TEMPLATES
from tokenthrift.dllm_asr.step_audio import OUTPUT_SIZE
from tokenthrift.hub import HubModel
from tokenthrift.sources import WeightsError
from tokenthrift.untrusted import read_checkpoint, tensors_in
from tokenthrift.weights import empty_parameters

__all__ = ["ReleasedDllmAsr", "is_released", "released"]

LANGUAGE_MODEL: Final = "GSAI-ML/LLaDA-8B-Instruct"
ENCODER: Final = "stepfun-ai/Step-Audio-2-mini"
HIDDEN, INTERMEDIATE, LAYERS, ROWS = 4096, 12_288, 32, 126_464
MASK, END, UNUSED = 126_336, 126_081, 126_463  # the last row of the embedding belongs to no token
RANK, ALPHA, DROPOUT = 16, 32.0, 0.05
WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")
_LORA = re.compile(r"(?:^|\.)blocks\.(\d+)\.(?:\w+\.)?(\w+)\.lora_(A|B)(?:\.\w+)?\.weight$")
_SIZES: Final[Mapping[str, tuple[str, int, int]]] = {
    "q_proj": ("self_attn.q_proj", HIDDEN, HIDDEN),
    "k_proj": ("self_attn.k_proj", HIDDEN, HIDDEN),
    "v_proj": ("self_attn.v_proj", HIDDEN, HIDDEN),
    "attn_out": ("self_attn.o_proj", HIDDEN, HIDDEN),
    "ff_proj": ("mlp.gate_proj", HIDDEN, INTERMEDIATE),
    "up_proj": ("mlp.up_proj", HIDDEN, INTERMEDIATE),
    "ff_out": ("mlp.down_proj", INTERMEDIATE, HIDDEN),
}
"""LLaDA's projections: the name that a Llama has, and the widths of input and output."""


class ReleasedDllmAsr(HubModel):
    """The tensors of a converted checkpoint under the names of `DllmAsr`, which reads what `save_pretrained` writes.

    Args:
        config: names encoder and language model.
        state: adapter and low-rank adapters.
    """

    system: ClassVar[str] = "dllm_asr"
    config_class: ClassVar[type] = DllmAsrConfig

    def __init__(self, config: DllmAsrConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__(config)
        self._state = dict(state)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """The tensors."""
        return dict(self._state)


def is_released(path: Path) -> bool:
    """Whether a file holds low-rank adapters of LLaDA's blocks."""
    try:
        return any(_LORA.search(name) for name in _state(path))
    except (WeightsError, OSError):
        return False


def released(path: Path) -> ReleasedDllmAsr:
    """Reads the authors' checkpoint.

    Raises:
        WeightsError: it holds anything but tensors and plain data, or a tensor is missing, unknown or of another size.
    """
    state = _state(path)
    adapter: dict[str, Tensor] = {}
    lora: dict[tuple[int, str, str], Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if (found := _LORA.search(name)) is not None:
            lora[int(found[1]), found[2], found[3]] = tensor
        elif _is_frozen(name):
            continue
        elif name.endswith((".weight", ".bias")) and _widths(tensor) in ((HIDDEN, OUTPUT_SIZE), (HIDDEN,)):
            kind = name.rpartition(".")[2]
            if kind in adapter:
                unknown.append(name)
            adapter[kind] = tensor
        else:
            unknown.append(f"{name} {list(tensor.shape)}")
    if unknown:
        raise WeightsError(f"{path}: not of the released dLLM-ASR: {', '.join(unknown[:5])}")
    if missing := {"weight", "bias"} - adapter.keys():
        raise WeightsError(f"{path}: the adapter Linear({OUTPUT_SIZE}, {HIDDEN}) lacks its {' and '.join(missing)}")
    layers, targets = _check_lora(path, lora)
    config = _config(layers, targets, next(iter(lora.values())).shape[0])
    out = {f"adapter.projection.{kind}": tensor for kind, tensor in adapter.items()}
    for (layer, name, side), tensor in lora.items():
        out[f"backbone.lm.model.layers.{layer}.{_SIZES[name][0]}.lora_{side}.default.weight"] = tensor
    return ReleasedDllmAsr(config, out | _silent_draft(config))


def _check_lora(path: Path, lora: Mapping[tuple[int, str, str], Tensor]) -> tuple[int, list[str]]:
    """How many layers are adapted, and which projections; all of one rank."""
    if unknown := sorted({name for _, name, _ in lora} - _SIZES.keys()):
        raise WeightsError(f"{path}: LLaDA has no projection {', '.join(unknown)}")
    layers, names = 1 + max(layer for layer, _, _ in lora), [n for n in _SIZES if n in {name for _, name, _ in lora}]
    if layers > LAYERS:
        raise WeightsError(f"{path}: adapters of {layers} layers, LLaDA-8B has {LAYERS}")
    if flat := [f"lora_{side} of {name} in block {layer}" for (layer, name, side), t in lora.items() if t.ndim != 2]:
        raise WeightsError(f"{path}: {flat[0]} is no matrix")
    ranks = {tensor.shape[0 if side == "A" else -1] for (_, _, side), tensor in lora.items()}
    if ranks != {RANK}:
        raise WeightsError(f"{path}: adapters of rank {', '.join(map(str, sorted(ranks)))}, released ones have {RANK}")
    for layer in range(layers):
        for name in names:
            _, width, out = _SIZES[name]
            for side, shape in (("A", (RANK, width)), ("B", (out, RANK))):
                tensor = lora.get((layer, name, side))
                if tensor is None:
                    raise WeightsError(f"{path}: lora_{side} of {name} in block {layer} is missing")
                if _widths(tensor) != shape:
                    shown = f"lora_{side} of {name} in block {layer}"
                    raise WeightsError(f"{path}: {shown} is {list(tensor.shape)} instead of {list(shape)}")
    return layers, names


def _config(layers: int, targets: list[str], rank: int) -> DllmAsrConfig:
    shape = BackboneShape(
        model_type="llama",
        vocab_size=ROWS,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=4096,
        mask_id=MASK,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    return DllmAsrConfig(
        vocab_size=ROWS,
        encoder=EncoderConfig(
            kind="step_audio",
            source=ENCODER,
            hidden_size=1280,
            num_hidden_layers=32,
            num_attention_heads=20,
            intermediate_size=5120,
            num_mel_bins=128,
        ),
        adapter=AdapterConfig(pool=2, stride=2),
        draft=DraftConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4),
        backbone=BackboneConfig(
            family="llada",
            source=LANGUAGE_MODEL,
            language_model=shape,
            lora=LoraConfig(rank=rank, alpha=ALPHA, dropout=DROPOUT, targets=tuple(targets)),
            prompt=TEMPLATES["llada"],
            end_id=END,
            delete_id=UNUSED,
        ),
        decode=DecodeConfig(draft="none", verify_threshold=0.0, prune="first", slots_per_second=8.0),
    )


def _silent_draft(config: DllmAsrConfig) -> dict[str, Tensor]:
    """A draft head of zeros: it writes nothing until one is trained."""
    from tokenthrift.dllm_asr.draft import DraftHead

    with empty_parameters():
        head = DraftHead(config.draft, config.encoder.hidden_size)
    return {f"draft.{name}": torch.zeros(tensor.shape) for name, tensor in head.state_dict().items()}


def _state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, whichever way they are wrapped."""
    found = read_checkpoint(path)
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    return tensors_in(found, path)


def _is_frozen(name: str) -> bool:
    """Weights that a checkpoint may have kept although they were not trained; the folder names their source."""
    return bool(
        re.search(r"(?:^|\.)transformer\.(?:wte|ln_f|ff_out)\.weight$", name)
        or re.search(r"(?:^|\.)blocks\.\d+\.(?:\w+_norm|(?:\w+)(?:\.base_layer)?)\.weight$", name)
        or re.search(r"(?:^|\.)(?:speech_)?encoder\.", name)  # `speech_encoder` holds Step-Audio's own adapter too
    )


def _widths(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
