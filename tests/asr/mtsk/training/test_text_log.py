"""Texts of a validation in files that people read."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.training.text_log import TEXTS, log_texts


def test_both_loggers_show_what_was_read(tmp_path: Path) -> None:
    csv, board = CSVLogger(tmp_path, version="0"), TensorBoardLogger(tmp_path, version="0")
    pairs = [(f"said {i}", f"read {i}") for i in range(9)]
    for step in (5, 10):
        log_texts([csv, board], step, {Rates(4, 2): pairs})
    board.experiment.flush()
    text = (Path(csv.log_dir) / TEXTS).read_text()
    assert text.count("said 7") == 2
    assert "said 8" not in text
    assert "Step 5" in text
    events = EventAccumulator(board.log_dir)
    events.Reload()
    found = events.Tensors("val/texts/text_summary")
    assert [event.step for event in found] == [5, 10]
    assert b"read 0" in found[0].tensor_proto.string_val[0]
