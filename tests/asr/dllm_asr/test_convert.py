"""`tokenthrift convert dllm_asr` and files that it does not read: one line that names the file, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenthrift.cli import main

TRAINED = {"config": {"train_draft": True, "train_denoiser": True}}


def write_empty(path: Path) -> None:
    path.touch()


def write_text(path: Path) -> None:
    path.write_text("to whom it may concern\n" * 9)


def write_code(path: Path) -> None:
    # What a pickle runs when it is read; anything but tensors and plain data is refused.
    torch.save({"hyper_parameters": TRAINED, "state_dict": {"weight": Path}}, path)


def write_old(path: Path) -> None:
    torch.save({"hyper_parameters": TRAINED, "state_dict": {}}, path, _use_new_zipfile_serialization=False)


def write_half(path: Path) -> None:
    torch.save({"hyper_parameters": TRAINED, "state_dict": {"weight": torch.zeros(99)}}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "content",
    [
        write_empty,
        write_text,
        write_code,
        write_old,
        write_half,
        torch.zeros(3),
        [1, 2],
        {"state_dict": {}},
        {"hyper_parameters": TRAINED},
        {"hyper_parameters": {"config": {"train_denoiser": True}}, "state_dict": {}},
        {"hyper_parameters": ["config"], "state_dict": {}},
        {"hyper_parameters": TRAINED, "state_dict": [1]},
        {"hyper_parameters": TRAINED, "state_dict": {1: torch.zeros(3)}},
        {"hyper_parameters": TRAINED, "state_dict": {"model.encoder.conv1.weight": 3}},
    ],
    ids=lambda content: getattr(content, "__name__", str(content)),
)
@pytest.mark.parametrize("system", ["dllm_asr", "dllm_asr_autoregressive"])
def test_other_files_are_refused(content: Any, system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.ckpt"
    if callable(content):
        content(path)
    else:
        torch.save(content, path)
    assert main(["convert", system, str(path), str(tmp_path / "out")]) == 1
    complaint = f"tokenthrift convert: {path} is no checkpoint of a dLLM-ASR training\n"
    assert capsys.readouterr().err == complaint
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_called_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "dllm_asr", str(tmp_path / "nowhere.ckpt"), str(tmp_path / "out")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_options_of_another_release_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.ckpt"
    options = {"config": {**TRAINED["config"], "lip_share": 0.5}}
    torch.save({"hyper_parameters": options, "state_dict": {}}, path)
    assert main(["convert", "dllm_asr", str(path), str(tmp_path / "out")]) == 1
    assert "lip_share" in capsys.readouterr().err
