"""KARL's recipes: every file is understood, commented and makes a module; data are split; calibration is kept."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, tiny_config, tiny_karl
from tokenthrift.cli import main
from tokenthrift.config import from_plain, to_plain
from tokenthrift.karl import Karl
from tokenthrift.karl.config import BaseConfig, KarlConfig
from tokenthrift.training.optim import OptimConfig

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "karl"
NAMES = (
    *(f"{size}_{part}" for size in ("photos", "tiny") for part in ("base", "stage1", "stage2")),
    *("imagenet100_stage1", "imagenet100_stage2"),
)


SMALL = ("small_base", "small_stage1", "small_stage2")
"""Each on top of the photos recipe of its stage."""


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPE))
    return importlib.import_module(name)


def test_no_recipe_is_left_out() -> None:
    assert sorted(path.stem for path in RECIPE.glob("*.yaml")) == sorted([*NAMES, *SMALL])


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_understood_and_make_a_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", str(RECIPE / f"{name}.yaml"), "--print_config"])
    assert caught.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    module, _, kind = model["class_path"].rpartition(".")
    given = {key: value for key, value in model["init_args"].items() if key not in ("base_from", "start_from")}
    if "lpips_weight" in given:
        given["lpips_weight"] = 0.0  # its weights would be downloaded
    config = from_plain(BaseConfig if kind == "KarlBaseModule" else KarlConfig, given.pop("config"))
    optim = from_plain(OptimConfig, given.pop("optim"))
    with torch.device("meta"):
        made = getattr(importlib.import_module(module), kind)(config, optim, **given)
    assert module == "tokenthrift.karl"
    assert kind in ("KarlBaseModule", "KarlStage1Module", "KarlStage2Module")
    assert made.hparams["config"] == to_plain(config), "plain data, or a checkpoint could not be read"
    assert made.optim == optim
    assert not isinstance(config, KarlConfig) or made.model.config == config


def test_every_field_of_a_model_is_printed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """A model given as a plain dictionary would hide them."""
    with pytest.raises(SystemExit):
        main(["fit", "--model", "tokenthrift.karl.KarlStage1Module", "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    fields = {field.name for field in dataclasses.fields(KarlConfig)}
    assert set(model["config"]) == fields
    assert {"learning_rate", "warmup_steps", "min_lr"} <= set(model["optim"])
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "tokenthrift.karl.KarlStage1Module"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"--model.config.{name}" in shown for name in fields - {"base", "encoder", "decoder"})
    assert "--model.config.encoder.num_hidden_layers" in shown
    assert "--model.relabel_prob" in shown
    assert "Halting probability above which a token is dropped" in shown


@pytest.mark.parametrize("name", [*NAMES, *SMALL])
def test_recipes_comment_every_key(name: str) -> None:
    lines = (RECIPE / f"{name}.yaml").read_text().splitlines()
    assert [line for line in lines if line.strip(" -") not in ("init_args:", "") and "#" not in line] == []


@pytest.mark.parametrize("size", ["photos", "tiny"])
def test_the_three_recipes_of_a_size_are_of_one_model(size: str) -> None:
    base, first, second = (
        yaml.safe_load((RECIPE / f"{size}_{part}.yaml").read_text()) for part in ("base", "stage1", "stage2")
    )
    assert first["model"]["init_args"]["config"] == second["model"]["init_args"]["config"]
    assert first["model"]["init_args"]["config"]["base"] == base["model"]["init_args"]["config"]
    assert first["model"]["init_args"]["base_from"] == f"{base['trainer']['default_root_dir']}/last.ckpt"
    assert second["model"]["init_args"]["start_from"] == f"{first['trainer']['default_root_dir']}/last.ckpt"


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
@pytest.mark.parametrize("name", SMALL)
def test_the_larger_recipes_run(name: str, tmp_path: Path) -> None:
    base = "model.init_args.config" if name == "small_base" else "model.init_args.config.base"
    images = tmp_path / "images.npy"
    np.save(images, (pictures(4, (128, 128), 0) * 255).to(torch.uint8).numpy())
    sources = {
        "data.init_args.train": json.dumps({str(images): 1}),
        "data.init_args.dev": json.dumps({"x": str(images)}),
    }
    own = {**sources, "data.init_args.batch_size": "2", "data.init_args.workers": "0", f"{base}.channels": "16"}
    own |= {"trainer.accelerator": "cpu", "trainer.fast_dev_run": "2", "trainer.default_root_dir": str(tmp_path)}
    if name != "small_stage1":
        own["model.init_args.lpips_weight"] = "0"
    if name != "small_base":
        for half in ("encoder", "decoder"):
            sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            own |= {f"model.init_args.config.{half}.{key}": str(value) for key, value in sizes.items()}
        source = "base_from" if name == "small_stage1" else "start_from"
        own |= {f"model.init_args.{source}": "null", "model.init_args.config.codebook_size": "64"}
    if name == "small_stage1":
        steps = ("quantize_start_step", "guide_until_step", "second_pass_start_step")
        own |= {f"model.init_args.{step}": "1" for step in steps} | {"trainer.accumulate_grad_batches": "1"}
    configs = [f"--config={RECIPE / recipe}.yaml" for recipe in (name.replace("small", "photos"), name)]
    assert main(["fit", *configs, *(f"--{key}={value}" for key, value in own.items())]) == 0


def test_no_base_character_is_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = script("pack", monkeypatch)
    assert pack.base_character("1f44d-1f3fd") == pack.base_character("1f44d") == "1f44d", "skin tones"
    assert pack.base_character("1f468-200d-1f4bb") == pack.base_character("1f9d1-1f3ff-200d-1f680"), "people"
    assert pack.base_character("1f1e9-1f1ea") != pack.base_character("1f1eb-1f1f7"), "flags"
    drawn: dict[tuple[int, ...], str] = {}
    for artist in ("a", "b"):
        (tmp_path / artist).mkdir()
        for number in range(60):
            color = (number, 100, 200 if artist == "a" else 50)
            for tone in ("", "-1f3fb", "-1f3ff"):
                name = f"{0x1F400 + number:x}{tone}"
                Image.new("RGBA", (8, 8), (*color, 255)).save(tmp_path / artist / f"{name}.png")
                drawn[color] = pack.base_character(name)
    counts, bases = {}, {}
    for part in ("train", "dev", "test"):
        seen = [image.getpixel((0, 0)) for image in pack.emoji(tmp_path, part, 8)]
        counts[part], bases[part] = len(seen), {drawn[color] for color in seen}
    assert sum(map(len, bases.values())) == len(set.union(*bases.values())) == 60
    assert all(bases.values())
    assert counts["train"] == 6 * len(bases["train"])
    for part in ("dev", "test"):
        assert counts[part] == 2 * len(bases[part]), "one drawing of each artist"
    photos = [set(indices) for indices in pack.PHOTOS.values()]
    assert sum(map(len, photos)) == len(set.union(*photos)) == 50_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_calibration_is_kept_beside_untouched_weights(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tiny_karl(tiny_config(grid=(4, 4)), decisive=True).save_pretrained(folder, dtype=dtype)
    before = (folder / "model.safetensors").read_bytes()
    saved = json.loads((folder / "config.json").read_text())
    for seed in range(2):
        np.save(tmp_path / f"{seed}.npy", (pictures(12 + seed, (16, 16), seed) * 255).to(torch.uint8).numpy())
    arguments = [folder, tmp_path / "0.npy", tmp_path / "1.npy", "--alpha", "0.2"]
    whole = (folder / "config.json").read_bytes()
    monkeypatch.setattr(
        sys,
        "argv",
        ["calibrate", *map(str, arguments), "--dry-run", "--targets", "1e-9", "0.9", "--test", str(arguments[1])],
    )
    script("calibrate", monkeypatch).main()
    printed = capsys.readouterr().out
    assert "0: 0.0% of 12 images miss 0.9 (95 % 0.0% to 0.0%), with" in printed
    assert "0: error 1e-09 for all but 20% of images" in printed
    assert (folder / "config.json").read_bytes() == whole
    monkeypatch.setattr(sys, "argv", ["calibrate", *map(str, arguments)])
    script("calibrate", monkeypatch).main()
    assert (folder / "model.safetensors").read_bytes() == before
    assert {t.dtype for t in load_file(folder / "model.safetensors").values() if t.is_floating_point()} == {dtype}
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    now = json.loads((folder / "config.json").read_text())
    assert now.pop("calibration")
    assert now == {k: v for k, v in saved.items() if k != "calibration"}, "model_type too"
    config = Karl.from_pretrained(folder).config
    assert config.calibration is not None
    assert (config.calibration.images, config.calibration.tokens, config.calibration.alpha) == (24, TOKENS, 0.2)
    assert replace(config, calibration=None) == tiny_config(grid=(4, 4))
    assert f"all but 20% stay within {config.calibration.bounds[0]:.4f}" in capsys.readouterr().out
