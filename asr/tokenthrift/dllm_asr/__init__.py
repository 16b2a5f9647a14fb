"""Speech recognition by a diffusion language model that denoises only what it must (dLLM-ASR, arXiv 2601.17902).

model           `DllmAsr`: encoder, draft, denoiser; `transcribe`
config          sizes and decoding settings
rates           which rate of the adapter a budget affords
draft, canvas   the CTC head, and the slots it leaves
decoding        from drafts to transcripts, by a sampler of `backbones.samplers`
certify         exactly the left-to-right text, by verified drafts; `reading` is the causal reading
n_best, hotwords, word_times
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
