"""Published checkpoints become model folders: files of their keys and shapes, a pickled Namespace, strangers' code."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tokenizers.karl.tiny_karl import TOKENS, pictures, released_config, tiny_karl
from tokenthrift.cli import main
from tokenthrift.config import ConfigError, from_plain, to_plain
from tokenthrift.karl.config import BASE_FIELDS, FIELDS, TRANSFORMER_FIELDS, KarlConfig, named, upgraded
from tokenthrift.karl.convert import RENAMED, karl, our_name, released_model
from tokenthrift.karl.convert import released_config as config_of
from tokenthrift.karl.model import Karl
from tokenthrift.sources import WeightsError

ROOT = Path(__file__).resolve().parents[3]
SMALL = (
    "karl_small_vqgan_quantized_latents",
    "karl_small_vqgan_continuous_latents",
    "karl_small_vae_quantized_latents",
    "karl_small_vae_continuous_latents",
)
"""The kinds of the five files; the fifth is the first of them trained on the whole of ImageNet."""


@pytest.fixture(scope="module")
def shapes(reference: Path) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = json.loads((reference / "karl" / "state_dict_keys.json").read_text())
    return found


def checkpoint(path: Path, shapes: dict[str, list[int]], **more: Any) -> Path:
    """A file of the published form in a few kilobytes: every tensor is one number, repeated."""
    one = torch.zeros(1)
    state = {name: one.as_strided(shape, [0] * len(shape)) for name, shape in shapes.items()}
    training = {"args": argparse.Namespace(lr=1e-4, output_dir="out"), "epoch": 399, "optimizer": {"state": {}}}
    torch.save({"model": state, "ema": state, **training, **more}, path)
    return path


def test_the_four_kinds_of_published_files(tmp_path: Path, shapes: dict[str, dict[str, list[int]]]) -> None:
    for kind in SMALL:
        file = checkpoint(tmp_path / f"{kind}.pth", shapes[kind])
        assert file.stat().st_size < 1e6
        model = karl([file])
        quantized, base = "quantized" in kind, "vae" if "vae" in kind else "vqgan"
        assert model.config == named("karl_small", base, quantized=quantized, compat="released")
        assert sum(p.numel() for p in model.parameters()) == sum(math.prod(shape) for shape in shapes[kind].values())
        assert not model.training


def test_discriminators_of_stage_two_are_left_out(tmp_path: Path, shapes: dict[str, dict[str, list[int]]]) -> None:
    more = {f"gan_losses.{i}.discriminator.main.0.weight": [64, 3, 4, 4] for i in range(8)}
    model = karl([checkpoint(tmp_path / "k.pth", {**shapes[SMALL[1]], **more})])
    assert model.config.codebook_size is None


TENSORS = (
    "latent_tokens decoder_mask_token decoder_latent_tokens_timestep_embed rec_loss_embeddings "
    "quantize.embedding.weight encoder_positional_embedding decoder_positional_embedding "
    "base_tokenizer.vqgan.quantize.embedding.weight"
)
LAYERS = (
    "patch_embed. encoder_ln_pre. encoder_ln_post_halt. encoder_ln_post. halting_mlp.0. halting_mlp.2. decoder.ln_pre. "
    "decoder.ln_post. decoder.ffn.0. decoder.ffn.2. decoder_embed. pre_quantizer_mlp."
)
PARTS = "ln_1. ln_2. attn.in_proj_ attn.out_proj. mlp.c_fc. mlp.c_proj."


def published(model: Karl) -> dict[str, Tensor]:
    """The tensors of our model under their published names."""
    blocks = [
        f"{half}.transformer.{i}.{part}" for half in ("encoder", "decoder") for i in range(2) for part in PARTS.split()
    ]
    theirs = TENSORS.split() + [part + end for part in LAYERS.split() + blocks for end in ("weight", "bias")]
    ours = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    theirs += [n.replace("base.", "base_tokenizer.vqgan.", 1) for n in ours if n[:8] in ("base.enc", "base.dec")]
    tensors = {name: ours.pop(our_name(name)) for name in theirs}
    assert not ours
    return tensors


def test_numbers_arrive_where_they_belong() -> None:
    model = tiny_karl(released_config(), decisive=True)
    again = released_model(published(model), released_config())
    images = pictures(2)
    a, b = (m.encode(images, f"{TOKENS},e0.05") for m in (model, again))
    assert torch.equal(a.embeddings, b.embeddings)
    assert torch.equal(model.decode(a), again.decode(b))
    assert not next(again.base.parameters()).requires_grad


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_karl(released_config())
    monkeypatch.setattr("tokenthrift.karl.convert.released_config", lambda _: released_config())
    file = tmp_path / "k.pth"
    torch.save({"ema": published(model), "model": {}, "args": argparse.Namespace(a=1)}, file)
    assert main(["convert", "karl", str(file), str(tmp_path / "out")]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["encoder.queries"].dtype == torch.float16
    loaded = Karl.from_pretrained(tmp_path / "out")
    assert loaded.config == model.config
    torch.testing.assert_close(loaded.encoder.queries, model.encoder.queries, rtol=1e-3, atol=1e-3)
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "max_tokens, retention, target_error (adaptive; at most 12 tokens)" in capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_our_training(tmp_path: Path, version: int) -> None:
    model = tiny_karl(decisive=True)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    fields = to_plain(model.config)
    options: dict[str, Any] = {"config": fields} if version == 2 else {"model": of_version_1(fields)}
    options["learning_rate"] = 1e-3
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {**weights, "offered": torch.zeros(3)}, "hyper_parameters": options, "loops": {}}, file)
    again = karl([file])
    assert isinstance(again, Karl)
    assert again.config == model.config
    assert torch.equal(again.encode(pictures(2)).embeddings, model.encode(pictures(2)).embeddings)
    torch.save({"state_dict": weights, "hyper_parameters": {"config": {"max_tokens": 0}}}, file)
    with pytest.raises(ConfigError, match="max_tokens must be between 1"):
        karl([file])


def of_version_1(fields: dict[str, Any]) -> dict[str, Any]:
    """A configuration under the names of format_version 1."""

    def back(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
        return {next((old for old, new in names.items() if new == name), name): v for name, v in data.items()}

    halves = {part: back(fields[part], TRANSFORMER_FIELDS) for part in ("encoder", "decoder")}
    return back({**fields, **halves, "base": back(fields["base"], BASE_FIELDS)}, FIELDS)


def test_a_folder_of_format_version_1(tmp_path: Path) -> None:
    """The shipped model as it was shipped in that version."""
    card, old = ROOT / "model_cards" / "karl-tiny-64", tmp_path / "model"
    old.mkdir()
    shutil.copy(card / "model.safetensors", old)
    shutil.copy(Path(__file__).parent / "config_version_1.json", old / "config.json")
    fields = json.loads((old / "config.json").read_text())
    assert fields["format_version"] == 1
    assert json.loads((card / "config.json").read_text())["format_version"] == 2
    now, then = Karl.from_pretrained(card), Karl.from_pretrained(old)
    assert then.config == now.config
    assert (then.config.encoder.num_hidden_layers, then.config.base.latent_channels) == (3, 64)
    images = pictures(3, (64, 64))
    tokens, same = (model.encode(images, "e0.12") for model in (now, then))
    assert torch.equal(tokens.embeddings, same.embeddings)
    assert torch.equal(now.decode(tokens), then.decode(same))
    for name in ("width", "codes"):
        (old / "config.json").write_text(json.dumps({**fields, "format_version": 2, name: 3}))
        with pytest.raises(ConfigError, match="unknown field"):
            Karl.from_pretrained(old)


def test_what_version_1_left_out_has_the_defaults_of_version_1() -> None:
    assert from_plain(KarlConfig, upgraded({"max_tokens": 64})).max_position_embeddings == 256
    released = upgraded({"compat": "released", "latent_attention": "full", "halting": "subset", "table": 512})
    assert from_plain(KarlConfig, released) == KarlConfig(compat="released")


class Runs:
    """Writes a file when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "ran"
    file = checkpoint(tmp_path / "k.pth", {"latent_tokens": [512, 1024]}, extra=Runs(trap))
    assert main(["convert", "karl", str(file), str(tmp_path / "out")]) == 1
    assert "asks for posix.system" in capsys.readouterr().err
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_other_tensors_are_refused_by_name() -> None:
    config = released_config()
    good = published(tiny_karl(config))
    for change, message in (
        ({"latent_tokens": None}, "encoder.queries is missing"),
        ({"surprise": torch.zeros(1)}, "surprise is unknown"),
        ({"decoder_embed.bias": torch.zeros(7)}, r"decoder.embed.bias is \[7\], not \[24\]"),
    ):
        tensors = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
        with pytest.raises(WeightsError, match=message):
            released_model(tensors, config)
    with pytest.raises(WeightsError, match="not a KARL checkpoint"):
        config_of({"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"widths and layers \(32, 2\) and \(24, 2\); known are karl_tiny"):
        config_of(good)


def test_one_file_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="one file, got 2"):
        karl([tmp_path, tmp_path])


def test_every_rule_of_renaming_is_needed(shapes: dict[str, dict[str, list[int]]]) -> None:
    names = {name for kind in SMALL for name in shapes[kind]}
    for pattern, _ in RENAMED:
        assert any(re.search(pattern, name) for name in names), pattern
