"""Adaptive image tokens: as many as an image's content needs for a target error (KARL, arXiv 2507.07995).

For users:
    model          `Karl`: encode under a budget, decode
    config         `KarlConfig`, and the paper's sizes by name
    verified       `encode_verified`: encode, measure the error, refine what missed it
    calibration    how small an error to condition on, so that misses are rare enough
    bits           byte strings of tokens, and budgets in bits
    tokens_to_llm  the tokens as a prefix of a language model
    convert        published checkpoints, and those of our training, to a model's folder
    files          image files on disk, for the command line
    halting, quantizer, selection, inputs   the steps of encoding, an idea each

`latent` holds the encoder and decoder of tokens, `base` the base tokenizers (an image to a grid of features and back).
For those who train: `training`. For those who measure: `evaluation`.
"""

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Karl": "model",
        "KarlBaseModule": "training.base_tokenizer",
        "KarlConfig": "config",
        "KarlDataModule": "training.data",
        "KarlStage1Module": "training.module",
        "KarlStage2Module": "training.module",
        "encode_verified": "verified",
    },
)
