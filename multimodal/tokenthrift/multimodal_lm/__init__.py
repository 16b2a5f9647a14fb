"""One language model that reads pictures, clips and recordings in one window, each under a budget.

config      `MultimodalConfig`: which language model, which systems in front of it, LoRA
prompts     `Media` and what a prompt is
model       `MultimodalLM`: prepare, generate, answer, loss
questions   native tokens and questions on disk
evaluate    curves of quality against tokens, and accuracy against the total by split
training    LightningModule and LightningDataModule over features on disk
"""

from tokenthrift.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Media": "prompts",
        "MultimodalConfig": "config",
        "MultimodalDataModule": "training.data",
        "MultimodalLM": "model",
        "MultimodalModule": "training.module",
    },
)
