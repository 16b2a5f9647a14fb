"""Audio-visual speech recognition at any rate with one model (Llama-MTSK, arXiv 2503.06362).

model         `LlamaMTSK`: encoders, projectors, adapters, language model
rates         pairs of rates, their price, the choice that fits a budget
compression   average pooling and stacking
lora          adapters for all scales, for each, or both
frozen        encoders and language model, which may lie elsewhere
sequence      what the language model reads
avhubert      the visual encoder
scales        training on all scales in the memory of one
lips          mouth crops of ordinary talking-face video
augmentation  noise at a stated level, rooms, masks
data          `MtskDataModule`: manifests, cached states, batches by frames
module        `MtskModule`: training under Lightning
evaluate      `tokenthrift evaluate mtsk`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenthrift.mtsk.data import MtskDataModule
    from tokenthrift.mtsk.model import LlamaMTSK
    from tokenthrift.mtsk.module import MtskModule
    from tokenthrift.mtsk.rates import Rates

__all__ = ["LlamaMTSK", "MtskDataModule", "MtskModule", "Rates"]

_HOMES = {"LlamaMTSK": "model", "MtskDataModule": "data", "MtskModule": "module", "Rates": "rates"}


def __getattr__(name: str) -> Any:
    """Imports a public class when it is asked for."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"tokenthrift.mtsk.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
