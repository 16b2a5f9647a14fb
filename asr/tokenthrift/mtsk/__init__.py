"""Audio-visual speech recognition at any rate with one model (Llama-MTSK, arXiv 2503.06362).

config          sizes, rates, strategy, decoding
model           `LlamaMtsk`: budgets, transcripts, folders
rates           pairs of rates, their tokens, the choice that fits a budget
planning        the rates and tokens of an item from its length alone
transcribing    batches of recordings to transcripts, over a small protocol
coarse_to_fine  the cheapest rates first, finer ones where the text is not confident
sequence        what the language model reads
network         encoders, projectors, adapters and language model at one pair of rates
lora            adapters for all scales, for each, or both
language_model  a Llama or Qwen of transformers, described by sizes
external        frozen parts whose weights lie elsewhere
convert         published checkpoints to model folders
audiovisual/    encoders, lips from ordinary video, noise
training/       `MtskModule`, `MtskDataModule`
evaluation/     `tokenthrift evaluate mtsk`
"""

from typing import TYPE_CHECKING

from tokenthrift import lazy

if TYPE_CHECKING:
    from tokenthrift.mtsk.config import MtskConfig as MtskConfig
    from tokenthrift.mtsk.model import LlamaMtsk as LlamaMtsk
    from tokenthrift.mtsk.rates import Rates as Rates
    from tokenthrift.mtsk.training.data import MtskDataModule as MtskDataModule
    from tokenthrift.mtsk.training.module import MtskModule as MtskModule

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {
        "LlamaMtsk": "model",
        "MtskConfig": "config",
        "MtskDataModule": "training.data",
        "MtskModule": "training.module",
        "Rates": "rates",
    },
    renamed={"LlamaMTSK": "LlamaMtsk"},
)
