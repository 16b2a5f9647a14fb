"""Pooling without training: a model at coarser rates than it was trained for.

Source: table 3 of Llama-MTSK (arXiv 2503.06362), where it is what training on many rates is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.training.start import Origin, carried_over

__all__ = ["pooled"]


def pooled(model: LlamaMtsk, audio_rates: Sequence[int], video_rates: Sequence[int]) -> LlamaMtsk:
    """A model at rates it was never trained for: the same projectors and adapters over coarser tokens.

    Args:
        model: of one pair of rates, whose tokens are means of states; its independent training is the base from which
            the loss of pooling without training is counted.
        audio_rates: its own and coarser; () without audio.
        video_rates: its own and coarser; () without video.

    Raises:
        ValueError: a model that cannot be pooled, or rates finer than its own.
    """
    config = model.config
    if config.lora.strategy != "MS":
        raise ValueError("only a model with one adapter for all scales (MS) can be pooled without training")
    if config.compression != "average":
        raise ValueError("a projector of stacked states fits one rate alone and cannot be pooled")
    for name, rates in (("audio", audio_rates), ("video", video_rates)):
        own: tuple[int, ...] = getattr(config, f"{name}_rates")
        if len(own) > 1:
            raise ValueError(f"a model of several {name} rates {list(own)} was trained for them; pool one of one pair")
        if any(not own or rate < own[0] for rate in rates):
            raise ValueError(f"{name} rates {list(rates)} are finer than {list(own)}, which pooling cannot give")
    config = replace(config, audio_rates=tuple(audio_rates), video_rates=tuple(video_rates), table=())
    coarse = LlamaMtsk(config, model.tokenizer, model.base_dir).eval()
    coarse.load_state_dict(carried_over(coarse, model.state_dict(), Origin.of(model.config)))
    coarse.load_external()
    return coarse
