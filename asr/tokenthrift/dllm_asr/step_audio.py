"""Step-Audio-2-mini's encoder and what comes after it, which the released dLLM-ASR reads.

Source: Step-Audio 2 (arXiv 2507.16632) and the tensor names of its Hub repository; dLLM-ASR (arXiv 2601.17902), whose
released code trains one linear layer, 3584 to 4096, behind them. A Whisper encoder of 128 mel bins without its last
norm, an average of two states, a norm, a convolution of kernel 3 and stride 2, and two linear layers: 12.5 positions of
width 3584 a second.

Differs from the published code: padding is masked at both steps, so a row of a batch equals the row alone, and a last
odd state is kept instead of left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.padding import length_mask
from tokenthrift.reducers.pooling import pool_by_rate

__all__ = ["OUTPUT_SIZE", "StepAudioAdapter", "step_audio_encoder", "step_audio_frontend"]

HIDDEN_SIZE: Final = 2048
OUTPUT_SIZE: Final = 3584
FRONTEND: Final = ("after_norm", "conv", "linear1", "linear2")
_LAYER: Final = {
    **{f"attn.{old}": f"self_attn.{new}_proj" for old, new in (("query", "q"), ("key", "k"), ("value", "v"))},
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


class StepAudioAdapter(nn.Module):
    """Encoder states to the memory of the language model; all but the last layer are Step-Audio's and frozen.

    Args:
        hidden_size: width of the encoder.
        memory_size: width of the language model.
    """

    def __init__(self, hidden_size: int, memory_size: int) -> None:
        super().__init__()
        self.frontend = nn.ModuleDict(
            {
                "after_norm": nn.LayerNorm(hidden_size),
                "conv": nn.Conv1d(hidden_size, hidden_size, 3, 2, padding=1),
                "linear1": nn.Linear(hidden_size, HIDDEN_SIZE),
                "linear2": nn.Linear(HIDDEN_SIZE, OUTPUT_SIZE),
            }
        ).requires_grad_(False)
        self.projection = nn.Linear(OUTPUT_SIZE, memory_size)

    def forward(self, states: Tensor, lengths: Tensor, rates: object = None) -> tuple[Tensor, Tensor]:
        """Encoder states `(B, N, hidden_size)` to memory `(B, M, memory_size)` and its mask `(B, M)`, at one rate."""
        del rates  # as `Adapter` takes them: there is no choice
        parts: Any = self.frontend
        x, lengths = pool_by_rate(states, lengths, 2)
        # The norm gives padding a value, which the convolution must not see.
        x = parts["after_norm"](x).masked_fill(~length_mask(lengths, x.shape[1])[..., None], 0.0)
        x = F.gelu(parts["conv"](x.transpose(1, 2))).transpose(1, 2)
        lengths = -(-lengths // 2)
        memory: Tensor = self.projection(parts["linear2"](F.relu(parts["linear1"](x))))
        return memory, length_mask(lengths, memory.shape[1])


def step_audio_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `WhisperEncoder` and its `positions` from Step-Audio's `encoder.*`."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith("encoder.") or name.startswith("encoder.after_norm"):
            continue
        parts = name.removeprefix("encoder.").split(".")
        if parts[0] == "positional_embedding":
            out["positions"] = tensor
        elif parts[0] == "blocks":
            kind, leaf = ".".join(parts[2:-1]), parts[-1]
            out[f"layers.{parts[1]}.{_LAYER.get(kind, kind)}.{leaf}"] = tensor
        else:
            out[".".join(parts)] = tensor
    return out


def step_audio_frontend(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `StepAudioAdapter.frontend` from Step-Audio's `encoder.after_norm` and `adapter.*`."""
    norm = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.after_norm.")}
    return norm | {k.removeprefix("adapter."): v for k, v in state.items() if k.startswith("adapter.")}
