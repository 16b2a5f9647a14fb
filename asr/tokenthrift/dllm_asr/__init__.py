"""Speech recognition by a diffusion language model that denoises only what it must (dLLM-ASR, arXiv 2601.17902).

model     `DllmAsr`: encoder, draft, denoiser; `transcribe`
module    `DllmAsrModule`: training under Lightning
data      `DllmAsrDataModule`: cached encoder states
autoregressive   the rival: the same decoder, left to right
draft     the CTC head and the canvas it leaves
denoise   confidence commits, pruning, verification
corruption, examples   the forward process and what training shows the denoiser
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.dllm_asr.autoregressive import AutoregressiveModule
    from tokenthrift.dllm_asr.data import DllmAsrDataModule
    from tokenthrift.dllm_asr.model import DllmAsr
    from tokenthrift.dllm_asr.module import DllmAsrModule

__all__ = ["AutoregressiveModule", "DllmAsr", "DllmAsrDataModule", "DllmAsrModule"]

_HOMES = {
    "AutoregressiveModule": "autoregressive",
    "DllmAsr": "model",
    "DllmAsrDataModule": "data",
    "DllmAsrModule": "module",
}


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for: a transcription needs no Lightning."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.dllm_asr.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
