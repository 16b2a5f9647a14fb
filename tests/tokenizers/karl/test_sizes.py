"""Published sizes, on the meta device: parameters as counted with the authors' classes, names and shapes of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tokenizers.karl.tiny_karl import tiny_karl
from tokenthrift.config import ConfigError, from_plain, to_plain
from tokenthrift.karl.config import BASES, NAMED_SIZES, BaseConfig, KarlConfig, TransformerConfig, named
from tokenthrift.karl.convert import our_name
from tokenthrift.karl.model import Karl


def counts(config: KarlConfig) -> tuple[int, int]:
    """Parameters of the whole model and of its base tokenizer."""
    with torch.device("meta"):
        model = Karl(config)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.base.parameters())


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("karl_tiny", 57.3),
        ("karl_small", 216.4),
        ("karl_base", 180.8),
        ("karl_small_decoder_semilarge", 317.2),
        ("karl_semilarge", 417.9),
    ],
)
def test_named_sizes_have_the_published_parameters(size: str, millions: float) -> None:
    whole, base = counts(named(size, compat="released"))
    assert round((whole - base) / 1e6, 1) == millions


def test_whole_models_have_the_published_parameters_to_the_last_one() -> None:
    assert counts(named("karl_small", compat="released")) == (270_911_120, 54_515_587)
    whole, base = counts(named("karl_small", "vae", quantized=False, compat="released"))
    assert whole == 280_921_568
    assert round(base / 1e6, 1) == 66.5


def test_every_size_is_tested() -> None:
    assert len(NAMED_SIZES) == 5


@pytest.mark.parametrize("base", ["vqgan", "vae"])
@pytest.mark.parametrize("quantized", [True, False])
def test_names_and_shapes_of_the_published_checkpoints(reference: Path, base: str, quantized: bool) -> None:
    kind = "quantized" if quantized else "continuous"
    published = json.loads((reference / "karl" / "state_dict_keys.json").read_text())[
        f"karl_small_{base}_{kind}_latents"
    ]
    with torch.device("meta"):
        model = Karl(named("karl_small", base, quantized=quantized, compat="released"))
    assert {our_name(name): shape for name, shape in published.items()} == {
        name: list(parameter.shape) for name, parameter in model.named_parameters()
    }


def test_small_base_tokenizers_are_small() -> None:
    for name in ("vqgan_small", "vae_small"):
        config = KarlConfig(
            base=BASES[name], encoder=TransformerConfig(hidden_size=256, num_attention_heads=4), grid=(8, 8)
        )
        assert config.size == (64, 64)
        assert counts(config)[1] < 4e6


def test_configurations_survive_json() -> None:
    for size in NAMED_SIZES:
        config = named(size, "vae", quantized=False)
        assert from_plain(KarlConfig, json.loads(json.dumps(to_plain(config)))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: named("karl_huge"), "'karl_huge' is none of karl_tiny"),
        (lambda: BaseConfig(channels=48), "channels 48 must be a multiple of norm_num_groups 32"),
        (
            lambda: TransformerConfig(hidden_size=100, num_attention_heads=3),
            "hidden_size 100 must be a multiple of num_attention_heads 3",
        ),
        (lambda: KarlConfig(max_position_embeddings=200), "max_position_embeddings must be between 256"),
        (lambda: KarlConfig(halting_threshold=1.5), "halting_threshold must be between 0.0 and 1.0"),
        (
            lambda: KarlConfig(encoder=TransformerConfig(hidden_size=256)),
            "encoder.hidden_size 256 must exceed base.latent_channels 256",
        ),
        (
            lambda: KarlConfig(compat="released", halting="prefix"),
            'goes with latent_attention "full" and halting "subset"',
        ),
    ],
)
def test_impossible_configurations_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_released_alone_gives_the_published_values() -> None:
    config = KarlConfig(compat="released")
    assert (config.latent_attention, config.halting, config.max_position_embeddings) == ("full", "subset", 512)
    assert (config.halting_threshold, config.token_dim, config.codebook_size) == (0.75, 12, 4096)
    assert config == named("karl_small", compat="released")
    ours = KarlConfig()
    assert (ours.latent_attention, ours.halting, ours.max_position_embeddings) == ("causal", "prefix", 256)
    assert KarlConfig(max_tokens=300).max_position_embeddings == 300


def test_a_model_that_nobody_trains_is_in_evaluation_mode() -> None:
    assert not any(module.training for module in tiny_karl().modules())
