"""`tokenthrift fit|validate|test|predict` with a model and data small enough to train in a second."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tokenthrift.budget import BudgetLike, TokenBudget
from tokenthrift.cli import main

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.multimodal.test_training_cli"
STEPS_PER_EPOCH = 4


class TinyModule(LightningModule):
    """A linear model with dropout, which writes every loss to a file and can kill its own process.

    Args:
        log: file that gets one line per training step.
        learning_rate: step size.
        budget: what a real model would honour.
        die_at: training step at which the process is killed.
    """

    def __init__(
        self, log: str, learning_rate: float = 0.1, budget: BudgetLike = "100%", die_at: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.log_file = Path(log)
        self.die_at = die_at
        self.learning_rate = learning_rate
        self.budget = TokenBudget.parse(budget)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
        entry = {"step": self.global_step, "loss": loss.item(), "rate": self.learning_rate}
        with self.log_file.open("a") as file:
            file.write(json.dumps({**entry, "budget": self.budget.to_dict()}) + "\n")
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/error", (self.net(batch[0]) - batch[1]).abs().mean())

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.validation_step(batch, index)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        prediction: Tensor = self.net(batch[0])
        return prediction

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class TinyData(LightningDataModule):
    """Sixteen items; all the same ones where order must not matter."""

    def __init__(self, same: bool = False, shuffle: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(16, 4, generator=generator)
        if same:
            inputs[:] = inputs[0]
        self.items = TensorDataset(inputs, inputs.sum(1, keepdim=True))
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.items, batch_size=16 // STEPS_PER_EPOCH, shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.items, batch_size=8)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three epochs, a checkpoint after each and `last.ckpt`."""
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "checkpoints"),
            "save_last": True,
            "save_top_k": 0,
            "enable_version_counter": False,
        },
    }
    fields = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "default_root_dir": str(tmp_path),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [checkpoint],
        },
        "model": {"class_path": f"{HERE}.TinyModule", "init_args": {"log": str(tmp_path / "log.jsonl")}},
        "data": {"class_path": f"{HERE}.TinyData"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return entries


def losses(entries: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in entries]


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, without what the tests silence."""
    roots = (ROOT, ROOT / "multimodal", ROOT / "tokenizers", ROOT / "asr")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    environment.pop("JSONARGPARSE_DEPRECATION_WARNINGS", None)
    command = [sys.executable, "-m", "tokenthrift.cli", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize(("known", "precision", "warned"), [(False, "bf16-mixed", True), (True, "bf16-mixed", False)])
def test_a_precision_that_the_processor_only_imitates_is_named(
    known: bool, precision: str, warned: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenthrift.training.precision.cpu_has_bf16", lambda: known)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["fit", "--config", str(recipe), "--trainer.precision", precision]) == 0
    messages = [str(warning.message) for warning in caught if "no bf16 instructions" in str(warning.message)]
    assert bool(messages) == warned
    assert all("--trainer.precision 32-true" in message for message in messages)


def test_fit_is_seeded_and_writes_checkpoint_and_recipe(recipe: Path, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(recipe)]) == 0
    first = read_log(tmp_path)
    assert [entry["step"] for entry in first] == list(range(3 * STEPS_PER_EPOCH))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert len(list(tmp_path.glob("lightning_logs/*/config.yaml"))) == 1
    main(["fit", "--config", str(recipe)])
    assert losses(read_log(tmp_path)) == losses(first)
    main(["fit", "--config", str(recipe), "--seed_everything", "1"])
    assert losses(read_log(tmp_path)) != losses(first)


def test_metrics_go_to_csv_and_to_tensorboard(recipe: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load(recipe.read_text())
    fields["trainer"] |= {"logger": True, "log_every_n_steps": 1, "max_epochs": 1}
    recipe.write_text(yaml.safe_dump(fields))
    main(["fit", "--config", str(recipe)])
    (folder,) = tmp_path.glob("lightning_logs/*")
    assert (folder / "metrics.csv").read_text().startswith("epoch,")
    assert list(folder.glob("events.out.tfevents.*"))


def test_an_ended_run_goes_on_with_equal_losses(recipe: Path, tmp_path: Path) -> None:
    """Shuffled data and dropout: both random states have to come back."""
    main(["fit", "--config", str(recipe)])
    whole = losses(read_log(tmp_path))
    main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"])
    part = losses(read_log(tmp_path))
    main(["fit", "--config", str(recipe), "--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")])
    rest = losses(read_log(tmp_path))
    assert part == whole[:STEPS_PER_EPOCH]
    assert rest == whole[STEPS_PER_EPOCH:]


def test_a_killed_run_goes_on_with_equal_losses(recipe: Path, tmp_path: Path) -> None:
    """Killed in its second epoch, two steps after a checkpoint in the middle of it."""
    fields = yaml.safe_load(recipe.read_text())
    fields["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 5
    fields["data"]["init_args"] = {"same": True, "shuffle": False}
    recipe.write_text(yaml.safe_dump(fields))
    main(["fit", "--config", str(recipe)])
    whole = losses(read_log(tmp_path))
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.unlink()

    killed = run("fit", "--config", recipe, "--model.init_args.die_at", 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for noise in ("Tip:", "Deprecat", "LeafSpec", "tensorboardX", "sys.argv"):
        assert noise not in killed.stdout + killed.stderr
    assert losses(read_log(tmp_path)) == whole[:7]
    assert main(["fit", "--config", str(recipe), "--ckpt_path", str(checkpoint)]) == 0
    assert losses(read_log(tmp_path)) == whole[5:]


def test_checkpoints_hold_nothing_but_data(recipe: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1", "--model.init_args.budget", "25%"])
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert "RandomState" in checkpoint["callbacks"]
    assert checkpoint["hyper_parameters"]["budget"] == "25%"


def test_flags_win_over_arguments_in_the_checkpoint(recipe: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(recipe), "--trainer.max_epochs", "1"])
    read_log(tmp_path)
    again = ["--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt"), "--model.init_args.learning_rate", "0.5"]
    main(["fit", "--config", str(recipe), *again])
    assert {entry["rate"] for entry in read_log(tmp_path)} == {0.5}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_other_commands_run(recipe: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", str(recipe)]) == 0
    assert ("val/error" in capsys.readouterr().out) == (command != "predict")


def test_printed_recipes_are_recipes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.max_epochs", "7", "--model.init_args.budget", "12.5/s"]
    with pytest.raises(SystemExit) as first:
        main(["fit", "--config", str(recipe), *flags, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    with pytest.raises(SystemExit) as second:
        main(["fit", "--config", str(tmp_path / "printed.yaml"), "--print_config"])
    assert (first.value.code, second.value.code) == (0, 0)
    assert capsys.readouterr().out == printed
    fields = yaml.safe_load(printed)
    assert fields["trainer"]["max_epochs"] == 7
    assert fields["model"]["init_args"]["budget"] == "12.5/s"
    assert fields["seed_everything"] == 0


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (64, TokenBudget(max_tokens=64)),
        ("25%", TokenBudget(retention=0.25)),
        ("64,e0.05", TokenBudget(max_tokens=64, target_error=0.05)),
        ({"tokens_per_second": 12.5}, TokenBudget(tokens_per_second=12.5)),
    ],
)
def test_budgets_are_written_in_yaml_and_in_flags(
    recipe: Path, tmp_path: Path, written: object, meant: TokenBudget
) -> None:
    fields = yaml.safe_load(recipe.read_text())
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    flag = written if isinstance(written, str) else json.dumps(written)
    main(["fit", "--config", str(recipe), *short, f"--model.init_args.budget={flag}"])
    fields["model"]["init_args"]["budget"] = written
    recipe.write_text(yaml.safe_dump(fields))
    main(["fit", "--config", str(recipe), *short])
    assert [entry["budget"] for entry in read_log(tmp_path)] == [meant.to_dict()] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.epochs", "3"], "epochs"),
        (["--model.init_args.learning_rat", "3"], "learning_rat"),
        (["--model.init_args.learning_rate", "fast"], "learning_rate"),
        (["--model", "no.such.Class"], "no.such.Class"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_named_and_exits_with_2(
    recipe: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(recipe), *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_to_do_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "usage: tokenthrift fit --config RECIPE.yaml [--NAME VALUE ...]\n\nTrain a model."
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(start)
    assert "--ckpt_path" in shown
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(recipe), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(start)
    assert "--trainer.max_epochs" in shown


def test_a_class_of_the_current_folder_is_found(recipe: Path, tmp_path: Path) -> None:
    """As the installed program runs, whose path does not begin with the current folder (-P)."""
    (tmp_path / "mydata.py").write_text(f"from {HERE} import TinyData\n\nclass MyData(TinyData): pass\n")
    fields = yaml.safe_load(recipe.read_text())
    fields["data"]["class_path"] = "mydata.MyData"
    recipe.write_text(yaml.safe_dump(fields))
    roots = (ROOT, ROOT / "multimodal", ROOT / "tokenizers", ROOT / "asr")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tokenthrift.cli", "fit", "--config", str(recipe), "--print_config"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "class_path: mydata.MyData" in done.stdout
