"""Recordings, and how transcripts of them are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.asr.tiny_dllm import speech
from tokenthrift.dllm_asr import DllmAsr
from tokenthrift.transcript import Transcript


def alike(one: Transcript, other: Transcript) -> None:
    """Equal but for the last digits of confidences."""
    assert one.text == other.text
    assert one.usage == other.usage
    assert [(t.text, t.start, t.end) for t in one.tokens] == [(t.text, t.start, t.end) for t in other.tokens]
    assert [t.confidence for t in one.tokens] == pytest.approx([t.confidence for t in other.tokens], abs=1e-4)


AUDIO = [speech(seconds, seed) for seed, seconds in enumerate([0.5, 0.2, 0.8, 0.02, 0.5, 0.3])]


@contextmanager
def decoding(model: DllmAsr, **changes: Any) -> Iterator[DllmAsr]:
    """The model with other decoding settings, for a while."""
    config = model.config
    model.config = replace(config, decode=replace(config.decode, **changes))
    try:
        yield model
    finally:
        model.config = config
