"""What learns how fast, and with which weights a training begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenthrift.training.optim import OptimConfig, adamw, cosine_schedule, optimizer_and_schedule, parameter_groups
from tokenthrift.training.start_weights import load_start_weights, read_start_weights


class Small(nn.Module):
    """A module that holds its model as `model`."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"read": nn.Linear(3, width), "norm": nn.LayerNorm(width)})
        self.table = nn.Parameter(torch.zeros(2, width))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = adamw(parameter_groups(Small(), config), config)
    schedule = cosine_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_matrices_decay_and_vectors_do_not() -> None:
    module, config = Small(), OptimConfig(weight_decay=0.3, learning_rate=0.1)
    decaying, others = parameter_groups(module, config, no_decay=("*table",), learning_rate=0.2)
    assert decaying["params"] == [module.model["read"].get_parameter("weight")]
    assert {id(p) for p in others["params"]} == {
        id(p) for p in (module.table, module.model["read"].bias, *module.model["norm"].parameters())
    }
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {group["lr"] for group in (decaying, others)} == {0.2}
    assert parameter_groups([("frozen", module.frozen)], config) == []


def test_the_rate_rises_then_falls_to_the_least() -> None:
    found = rates(OptimConfig(learning_rate=1.0, warmup_steps=4, min_lr=0.1), 20)
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert found[12] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert found[20] == pytest.approx(0.1)
    assert rates(OptimConfig(learning_rate=1.0, warmup_steps=0.2, min_lr=0.1), 20) == found, "a share of all steps"
    assert rates(OptimConfig(learning_rate=1.0), 5)[0] == 1.0


def test_every_group_keeps_its_own_rate() -> None:
    config = OptimConfig(learning_rate=1.0, betas=(0.5, 0.6), eps=1e-3)
    module = Small()
    groups = parameter_groups(module.model, config) + parameter_groups([("t", module.table)], config, learning_rate=0.5)
    made: dict[str, Any] = optimizer_and_schedule(groups, config, 10)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    optimizer.step()
    schedule.step()
    first, _, other = (group["lr"] for group in optimizer.param_groups)
    assert other == pytest.approx(first / 2)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """One set of weights, as a training checkpoint and as a model folder."""
    module = Small()
    nn.init.ones_(module.model["read"].get_parameter("weight"))
    checkpoint = tmp_path / "run.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": {"stage": "answers"}}, checkpoint)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"system": "small"}')
    save_file({k: v.half() for k, v in module.model.state_dict().items()}, folder / "model.safetensors")
    return {"checkpoint": checkpoint, "folder": folder}


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_a_training_begins_with_given_weights(sources: dict[str, Path], kind: str) -> None:
    module = Small()
    names = load_start_weights(module, sources[kind], keep=lambda name: name.startswith("model.read"))
    assert names == {"model.read.weight", "model.read.bias"}
    assert torch.equal(module.model["read"].get_parameter("weight"), torch.ones(4, 3))
    found = read_start_weights(sources[kind])
    assert (found.options, found.config) == (
        ({"stage": "answers"}, {}) if kind == "checkpoint" else ({}, {"system": "small"})
    )
    assert all(tensor.dtype == torch.float32 for tensor in found.tensors.values())


def test_weights_of_something_else_are_refused_before_anything_is_filled(sources: dict[str, Path]) -> None:
    before = Small()
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another model, it has model.read.bias, model.read.weight"):
        load_start_weights(nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.LayerNorm(4)})}), sources["folder"])
    with pytest.raises(ValueError, match=r"other sizes, model.norm.bias is \[4\], not \[5\]"):
        load_start_weights(Small(5), sources["folder"])
    with pytest.raises(ValueError, match="lacks table"):
        load_start_weights(before, sources["folder"], allow_missing=False)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.state_dict().items())
    torch.save([1], sources["checkpoint"])
    with pytest.raises(ValueError, match="no checkpoint of a training"):
        read_start_weights(sources["checkpoint"])
