"""What one item costs at every pair of rates: FLOPs of encoders, prefix and decoding, and time.

Source: table 4 of Llama-MTSK (arXiv 2503.06362) counts the prefix in the language model alone. What differs: encoders,
projectors and decoding are counted too, by running them (torch's FLOP counter, a multiplication and an addition being
two; attention counts every pair of positions, masked or not), and the time is measured beside. The cost of a pair of
rates includes the encoders of its own streams only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenthrift.evaluation.report import Cell, Table
from tokenthrift.mtsk.model import LlamaMtsk
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import PROMPTS
from tokenthrift.mtsk.training.clips import Clip
from tokenthrift.mtsk.transcribing import Recording

__all__ = ["Cost", "cost_table", "costs", "counted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an item costs at one pair of rates.

    Attributes:
        rates: the pair.
        tokens: of audio and video.
        positions: before the text, with markers and prompt.
        text: most tokens generated.
        encoders: FLOPs of the encoders of the streams that the pair takes.
        prefix: FLOPs of projectors and language model until the first token.
        decoding: FLOPs of the further tokens.
        encoding_seconds: time of the encoders.
        writing_seconds: time of all that follows.
        seconds: duration of the item.
    """

    rates: Rates
    tokens: int
    positions: int
    text: int
    encoders: float
    prefix: float
    decoding: float
    encoding_seconds: float
    writing_seconds: float
    seconds: float

    @property
    def milliseconds(self) -> float:
        """Time for a second of the item."""
        return 1000 * (self.encoding_seconds + self.writing_seconds) / self.seconds


def counted(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its FLOPs."""
    # The counter does not know the fused attention of a CPU and would take it for free.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return result, float(counter.get_total_flops())


@torch.no_grad()
def costs(model: LlamaMtsk, clip: Clip, repeats: int = 3) -> list[Cost]:
    """What an item costs at every pair of rates for which it has the streams.

    Args:
        model: any.
        clip: with sound, mouth crops, or both.
        repeats: of the measurement of time, of which the fastest counts.
    """
    recording = Recording(clip.audio, clip.video)
    audio = None if clip.audio is None or model.config.audio is None else [clip.audio]
    video = None if clip.video is None or model.config.video is None else [clip.video]
    encoders, times = {"audio": 0.0, "video": 0.0}, {"audio": 0.0, "video": 0.0}
    for name, stream in (("audio", audio), ("video", video)):
        if stream is not None:
            encode = partial(model.encode, **{name: stream})
            encoders[name], times[name] = counted(encode)[1], _fastest(encode, repeats)
    encoded = model.encode(audio, video)
    length = len(model.token_ids(clip.text)) + 1
    out = []
    for rates in model.config.scales:
        if (rates.audio and audio is None) or (rates.video and video is None):
            continue
        used = [name for name in ("audio", "video") if getattr(rates, name)]
        first, text = (partial(model.generate, encoded, rates, [n], beams=1) for n in (1, length))
        prefix, whole = counted(first)[1], counted(text)[1]
        prompt = len(model.token_ids(PROMPTS[bool(rates.audio), bool(rates.video)]))
        tokens = model.plan([recording.size], rates=rates)[0].used
        cost = Cost(
            rates=rates,
            tokens=tokens,
            positions=tokens + prompt + 2 * len(used) + (model.config.bos_id is not None),
            text=length,
            encoders=sum(encoders[name] for name in used),
            prefix=prefix,
            decoding=whole - prefix,
            encoding_seconds=sum(times[name] for name in used),
            writing_seconds=_fastest(text, repeats),
            seconds=recording.seconds,
        )
        out.append(cost)
    return out


def cost_table(title: str, found: Sequence[Cost]) -> Table:
    """One row per pair of rates; all of one item."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            str(c.rates),
            c.tokens,
            c.positions,
            *(flops / 1e9 for flops in (c.encoders, c.prefix, c.decoding)),
            *(1000 * seconds for seconds in (c.encoding_seconds, c.writing_seconds)),
        )
        for c in found
    )
    length = max((c.text for c in found), default=0)
    return Table(
        title=title,
        columns=(
            "(audio, video) rates",
            "tokens",
            "positions before the text",
            "encoders, GFLOP",
            "projectors and prefix, GFLOP",
            "decoding, GFLOP",
            "encoders, ms",
            "prefix and decoding, ms",
        ),
        rows=rows,
        note=f"Text of at most {length} tokens, greedy; an encoder runs once whatever the rate of its stream.",
    )


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
