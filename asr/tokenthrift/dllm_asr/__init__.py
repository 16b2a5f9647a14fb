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

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AutoregressiveModule": "training.autoregressive",
        "DllmAsr": "model",
        "DllmAsrDataModule": "training.data",
        "DllmAsrModule": "training.module",
    },
)
