"""Weights of one Llama-MTSK model as the start of another, of other rates, tasks or strategy.

Not in Llama-MTSK (arXiv 2503.06362): there every model starts from random projectors and adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenthrift.mtsk.config import MtskConfig, Strategy, Task, scales_of
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.training.start_weights import MODEL, read_start_weights

__all__ = ["Origin", "carried_over", "read_origin"]

ENCODERS = ("audio_encoder.", "video_encoder.")


@dataclass(frozen=True)
class Origin:
    """What the weights of another model were trained for.

    Attributes:
        tasks: of the model.
        audio_rates: of its projectors, in order.
        video_rates: of its projectors, in order.
        strategy: of its adapters.
    """

    tasks: tuple[Task, ...]
    audio_rates: tuple[int, ...]
    video_rates: tuple[int, ...]
    strategy: Strategy

    @classmethod
    def of(cls, config: MtskConfig) -> Origin:
        """That of a model with this configuration."""
        return cls(config.tasks, config.audio_rates, config.video_rates, config.lora.strategy)


def carried_over(model: LlamaMtsk, given: Mapping[str, Tensor], origin: Origin) -> dict[str, Tensor]:
    """A whole state dict for a model: given tensors where they fit, the model's own elsewhere.

    A projector comes from the given one of the nearest rate, so a model of one pair of rates starts one of many. One
    adapter for all scales (MS) starts that of every scale (SS), or the shared one (MSS), so that the model begins with
    the outputs of the given one; with the same strategy an adapter comes from that of the same pair of rates. All other
    adapters start as they are.

    Args:
        model: to be filled.
        given: state dict of another Llama-MTSK model of the same parts.
        origin: of the given one.
    """
    out = {}
    for name, own in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "lora":
            source = _adapter(name, model.config, origin)
        elif part in ("audio_proj", "video_proj"):
            source = _projector(part, rest, model.config, origin)
        else:
            source = name
        found = None if source is None else given.get(source)
        out[name] = found.to(own) if found is not None and found.shape == own.shape else own
    return out


def _projector(part: str, rest: str, config: MtskConfig, origin: Origin) -> str | None:
    """The name of the given projector's matrix with which one of the model's starts, if any does."""
    index, _, layer = rest.partition(".")
    name = part.replace("proj", "rates")
    known: tuple[int, ...] = getattr(origin, name)
    rate = getattr(config, name)[int(index)]
    return f"{part}.{known.index(min(known, key=lambda r: abs(r - rate)))}.{layer}" if known else None


def _adapter(name: str, config: MtskConfig, origin: Origin) -> str | None:
    """The name of the given adapter's matrix with which one of the model's starts, if any does."""
    head, index, matrix, weight = name.rsplit(".", 3)
    scales, k = config.scales, int(index)
    known = scales_of(origin.tasks, origin.audio_rates, origin.video_rates)
    source = None
    if origin.strategy == "MS":
        takes_over = {"MS": 0, "SS": k, "MSS": len(scales)}[config.lora.strategy]
        source = 0 if k == takes_over else None
    elif origin.strategy == config.lora.strategy:
        shared = k == len(scales)
        source = len(known) if shared else known.index(scales[k]) if scales[k] in known else None
    return None if source is None else f"{head}.{source}.{matrix}.{weight}"


def read_origin(source: str) -> tuple[dict[str, Tensor], Origin]:
    """The weights of a model folder or training checkpoint, and what they were trained for.

    Encoders are left out: they are frozen, and the states a new model trains on may be those of others.

    Raises:
        OSError: there is none.
    """
    found = read_start_weights(source)
    named = {name.removeprefix(MODEL): value for name, value in found.tensors.items()}
    weights = {name: value for name, value in named.items() if not name.startswith(ENCODERS)}
    if found.config:
        plain: dict[str, Any] = found.config
        rates = tuple(plain["audio_rates"]), tuple(plain["video_rates"])
        return weights, Origin(tuple(plain["tasks"]), *rates, plain["lora"]["strategy"])
    # Checkpoints of release 0.1.0 have the fields of the model beside the others.
    plain = found.options.get("config", found.options)
    rates = tuple(plain["audio_rates"] or (4, 16)), tuple(plain["video_rates"] or (2, 5))
    return weights, Origin(tuple(plain["tasks"] or ("avsr",)), *rates, plain["strategy"])
