"""VQToken's recipes: every file is understood, and the tiny ones make a module and fit each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tokenthrift.cli import main
from tokenthrift.vqtoken import LlavaVQTokenModule, VideoConversationsDataModule, VQTokenDataModule, VQTokenModule

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "vqtoken"
KINDS: dict[str, tuple[type, type]] = {
    "llava_onevision_0.5b": (LlavaVQTokenModule, VideoConversationsDataModule),
    "tiny": (VQTokenModule, VQTokenDataModule),
    "tiny_encoder": (VQTokenModule, VQTokenDataModule),
}

SMALL = {"small": "tiny", "small_encoder": "tiny_encoder"}
"""Recipes on top of others."""


def test_no_recipe_is_left_out() -> None:
    assert sorted(path.stem for path in RECIPE.glob("*.yaml")) == sorted([*KINDS, *SMALL])


@pytest.mark.parametrize("name", KINDS)
def test_recipes_are_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(RECIPE / f"{name}.yaml"), "--print_config"])
    assert caught.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    for part, kind in zip(("model", "data"), KINDS[name], strict=True):
        assert config[part]["class_path"].rpartition(".")[2] == kind.__name__
    data = KINDS[name][1](**config["data"]["init_args"])
    if isinstance(data, VQTokenDataModule):
        with torch.device("meta"):
            module = VQTokenModule(**config["model"]["init_args"])
        for size in ("num_frames", "image_size", "patch_size"):
            assert data.hparams[size] == getattr(module.model.config, size)
    for part in ("model", "data"):
        given = yaml.safe_load((RECIPE / f"{name}.yaml").read_text())[part]["init_args"]
        assert set(given) <= set(config[part]["init_args"])
    assert config["model"]["init_args"]["optim"]["betas"], "every field is shown"


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("name", SMALL)
def test_the_larger_recipes_run(name: str, tmp_path: Path) -> None:
    config = "model.init_args.config"
    sizes = {"encoder_hidden_size": 32, "encoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 64}
    own: dict[str, object] = {f"{config}.{key}": value for key, value in sizes.items()}
    own |= {"data.init_args.batch_size": 1, "data.init_args.dev_clips": 1, "data.init_args.backgrounds": "null"}
    own |= {"data.init_args.questions_per_clip": 2, "data.init_args.train_clips": 2}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": 2, "trainer.default_root_dir": tmp_path}
    # What docs/training.md adds to a recipe.
    own |= {"trainer.callbacks+": "lightning.pytorch.callbacks.EMAWeightAveraging"}
    own |= {"trainer.callbacks.init_args.decay": 0.9, "trainer.accumulate_grad_batches": 2}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in (SMALL[name], name)]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0


def test_both_stages_of_the_larger_recipe_are_of_one_model() -> None:
    first, second = (yaml.safe_load((RECIPE / f"{name}.yaml").read_text()) for name in ("small_encoder", "small"))
    assert first["model"]["init_args"]["config"] == second["model"]["init_args"]["config"]
