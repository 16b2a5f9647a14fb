"""Speech recognition by a diffusion language model that denoises only what it must (dLLM-ASR, arXiv 2601.17902).

model           `DllmAsr`: encoder, draft, denoiser; `transcribe`
config          sizes and decoding settings
draft           the CTC head and the canvas it leaves
denoise         confidence commits, pruning, verification
adapter         encoder states to the memory of the language model
vocabulary      words to tokens
autoregressive  the baseline: the same decoder, left to right
pretrained      a fresh model around published weights
convert         training checkpoints to a model folder
training/       Lightning modules, data, the forward process
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.dllm_asr.model import DllmAsr
    from tokenthrift.dllm_asr.training.autoregressive import AutoregressiveModule
    from tokenthrift.dllm_asr.training.data import DllmAsrDataModule
    from tokenthrift.dllm_asr.training.module import DllmAsrModule

__all__ = ["AutoregressiveModule", "DllmAsr", "DllmAsrDataModule", "DllmAsrModule"]

_HOMES = {
    "AutoregressiveModule": "training.autoregressive",
    "DllmAsr": "model",
    "DllmAsrDataModule": "training.data",
    "DllmAsrModule": "training.module",
}


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for: a transcription needs no Lightning."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.dllm_asr.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
