"""What one item costs at every pair of rates: FLOPs of encoders, prefix and decoding, and time.

Source: table 4 of Llama-MTSK (arXiv 2503.06362) counts the prefix in the language model alone. What differs: encoders,
projectors and decoding are counted too, by running them (torch's FLOP counter, a multiplication and an addition being
two), and the time is measured beside.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenthrift.evaluation.report import Cell, Table
from tokenthrift.mtsk.data import Clip
from tokenthrift.mtsk.model import LlamaMTSK
from tokenthrift.mtsk.rates import price
from tokenthrift.mtsk.sequence import PROMPTS
from tokenthrift.whisper import states_of

__all__ = ["cost_table", "counted"]


def counted(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return result, float(counter.get_total_flops())


@torch.no_grad()
def cost_table(title: str, model: LlamaMTSK, clip: Clip, repeats: int = 3) -> Table:
    """One row per pair of rates for which the item has the streams.

    Args:
        title: of the table.
        model: any.
        clip: with sound, mouth crops, or both.
        repeats: of the measurement of time, of which the fastest counts.
    """
    audio = None if clip.audio is None or model.audio_encoder is None else [clip.audio]
    video = None if clip.video is None or model.video_encoder is None else [clip.video]
    encoded, encoders = counted(lambda: model.encode(audio, video))
    encoding = _fastest(lambda: model.encode(audio, video), repeats)
    length = len(model.token_ids(clip.text)) + 1
    states = (0 if clip.audio is None else states_of(len(clip.audio)), 0 if clip.video is None else len(clip.video))
    rows: list[tuple[Cell, ...]] = []
    for rates in model.config.scales:
        if (rates.audio and audio is None) or (rates.video and video is None):
            continue
        first, text = (partial(model.write, encoded, rates, [n]) for n in (1, length))
        prefix, whole = counted(first)[1], counted(text)[1]
        seconds = _fastest(text, repeats)
        prompt = len(model.token_ids(PROMPTS[bool(rates.audio), bool(rates.video)]))
        around = prompt + 2 * (bool(rates.audio) + bool(rates.video)) + (model.config.bos_id is not None)
        tokens = price(rates, *states)
        cells = (tokens, tokens + around, encoders / 1e9, prefix / 1e9, (whole - prefix) / 1e9)
        rows.append((str(rates), *cells, 1000 * encoding, 1000 * seconds))
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
        rows=tuple(rows),
        note=f"Text of at most {length} tokens, greedy; the encoders run once whatever the rates.",
    )


def _fastest(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
