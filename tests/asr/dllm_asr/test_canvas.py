"""Canvases: what is not given, and what padding of a batch holds."""

from __future__ import annotations

import math

from tests.asr.tiny_dllm import vocabulary
from tokenthrift.dllm_asr.canvas import Canvas, build_canvas, num_open_slots, stack_canvases
from tokenthrift.dllm_asr.draft import DraftWord


def test_an_open_word_has_one_extra_slot_unless_told() -> None:
    vocab = vocabulary()
    assert num_open_slots(2, 0.0) == num_open_slots(2, 0.0, 1) == 3
    words = [DraftWord("go", 0.1, 0.0, 0.4)]
    canvas = build_canvas(words, vocab, 0.5, 0.0, 0)
    assert canvas == build_canvas(words, vocab, 0.5, 0.0, 0, 1)
    assert len(canvas.ids) == len(vocab.word("go")) + 1


def test_slots_of_a_word_end_with_it_unless_they_are_open() -> None:
    canvas = Canvas()
    canvas.extend([1], [1], 0.5, 1.0, 2.0)
    canvas.extend([1], [1], 0.5, 2.0, 2.0, open_end=True)
    assert canvas.windows == [(1.0, 2.0), (2.0, math.inf)]


def test_padding_is_an_end_that_may_be_spoken_at_any_time() -> None:
    vocab = vocabulary()
    long, short = Canvas(), Canvas()
    long.extend([1, 2], [vocab.mask_id, 3], 0.5, 1.0, 2.0)
    short.extend([1], [vocab.mask_id], 0.5, 1.0, 2.0)
    batch = stack_canvases([long, short], vocab)
    assert batch.windows[1].tolist() == [[1.0, 2.0], [0.0, math.inf]]
    assert batch.ids[1].tolist() == [1, vocab.eos_id]
    assert batch.hints.tolist() == [[vocab.mask_id, 3], [vocab.mask_id] * 2]
    assert batch.mask.tolist() == [[True, True], [True, False]]
