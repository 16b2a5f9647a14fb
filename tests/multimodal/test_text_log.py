"""Sample texts reach TensorBoard and, beside other loggers, a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenthrift.training.text_log import log_texts


def test_every_logger_gets_the_lines(tmp_path: Path) -> None:
    board, csv = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")
    module = LightningModule()
    log_texts(module, "val/answers", ["without a trainer"])
    run = {"loggers": [board, csv], "global_step": 30, "is_global_zero": True, "sanity_checking": False}
    for changed in ({"is_global_zero": False}, {"sanity_checking": True}, {}):
        trainer: Any = SimpleNamespace(**run | changed)
        module._trainer = trainer
        log_texts(module, "val/answers", ["one", "two"])
    board.experiment.flush()
    assert (Path(csv.log_dir) / "texts" / "val-answers-000030.txt").read_text() == "one\ntwo\n"
    events = EventAccumulator(board.log_dir).Reload()
    (event,) = events.Tensors("val/answers/text_summary")
    assert event.step == 30
    assert event.tensor_proto.string_val[0] == b"    one\n    two"
