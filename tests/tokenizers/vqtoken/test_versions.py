"""Model folders of format version 1 give the outputs that they gave in the release that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.tokenizers.vqtoken.clips import noise
from tokenthrift.config import ConfigError
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VideoAnswerer, VQToken, VQTokenConfig
from tokenthrift.vqtoken.synthetic.questions import WORDS, encode_text

CARD = ROOT / "model_cards" / "vqtoken-tiny"
PLAIN: dict[str, Any] = {
    "compat": "corrected",
    "attention": None,
    "codes": "mean",
    "choose": "fixed",
    "least": 1,
    "most": 256,
    "iterations": 20,
    "seed": 0,
}
ANSWERER: dict[str, Any] = {
    "system": "vqtoken_answerer",
    "format_version": 1,
    "frames": 8,
    "side": 64,
    "patch": 8,
    "frames_per_second": 4.0,
    "encoder_width": 128,
    "encoder_layers": 4,
    "encoder_heads": 4,
    "token_width": 192,
    "place_weight": 0.3,
    "width": 192,
    "layers": 3,
    "heads": 3,
    "ffn": 512,
    "words": ["colour" if word == "color" else word for word in WORDS],
    "vqtoken": PLAIN | {"attention": {"width": 192, "heads": 4, "ffn": 384, "patches": 64}},
}
# As release 0.1.0 answered: budget, then word, probability and tokens for every question.
ANSWERS: list[tuple[str, list[tuple[str, float, int]]]] = [
    ("32", [("still", 0.578372, 32), ("one", 0.695429, 32), ("blue", 0.81199, 32)]),
    ("64,e0.3", [("down", 0.945091, 64), ("two", 0.5583, 64), ("blue", 0.587621, 64)]),
    ("100%", [("down", 0.853723, 512), ("three", 0.466046, 512), ("blue", 0.354516, 512)]),
]
QUESTIONS = ["which way did the red circle move ?", "how many things moved ?", "what colour was the ring ?"]


def write(folder: Path, config: dict[str, Any], weights: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(weights, folder / "model.safetensors")
    return folder


def test_the_shipped_answerer_of_version_1_gives_its_answers(tmp_path: Path) -> None:
    older = VideoAnswerer.from_pretrained(write(tmp_path / "older", ANSWERER, CARD / "model.safetensors"))
    today = VideoAnswerer.from_pretrained(CARD)
    assert json.loads((CARD / "config.json").read_text())["format_version"] == 2
    assert older.config == today.config
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (1, 8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for budget, expected in ANSWERS:
        for model in (older, today):
            found = model.answer(clip, [QUESTIONS], budget)[0]
            assert [(answer.word, answer.usage.used) for answer in found] == [(w, used) for w, _, used in expected]
            assert [answer.confidence for answer in found] == pytest.approx([p for _, p, _ in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "labels", "total"),
    [
        (
            {"codes": "medoid", "iterations": 3, "most": 9, "choose": "elbow", "least": 2},
            [4, 0, 3, 2, 4, 0, 2, 4, 1, 0, 3, 0, 0, 2, 0, 2, 2, 3, 4, 1, 2, 4, 0, 1, 1, 2, 3, 2, 4, 2, 3, 2, 3, 1, 3]
            + [3, 4, 3, 0, 1],
            1.2020233869552612,
        ),
        (
            {"compat": "released", "iterations": 2},
            [0, 1, 2, 3, 4, 1, 4, 0, 5, 6, 7, 8, 9, 3, 1, 6, 10, 11, 0, 5, 10, 0, 9, 5, 5, 3, 11, 3, 4, 3, 6, 10, 11]
            + [4, 11, 7, 0, 7, 8, 5],
            1.7668217420578003,
        ),
        (
            {"compat": "released", "choose": "silhouette", "least": 3, "most": 9, "seed": 4},
            [0, 1, 1, 2, 3, 1, 3, 0, 3, 1, 2, 4, 1, 2, 1, 2, 4, 0, 4, 3, 4, 0, 1, 3, 3, 4, 0, 2, 3, 4, 2, 4, 0, 3, 0]
            + [2, 0, 2, 1, 3],
            -0.08749887347221375,
        ),
    ],
    ids=["medoids", "released", "silhouette"],
)
def test_reducers_of_version_1_give_their_codes(
    tmp_path: Path, fields: dict[str, Any], labels: list[int], total: float
) -> None:
    VQToken().save_pretrained(tmp_path / "today")
    config = {"system": "vqtoken", "format_version": 1, **PLAIN, **fields}
    model = VQToken.from_pretrained(write(tmp_path / "older", config, tmp_path / "today" / "model.safetensors"))
    done = model.compress(TokenBatch.from_items([noise(3, 40, 6)]), 12)
    assert done.maps[0].flatten().tolist() == labels
    assert float(done.tokens.embeddings.sum()) == pytest.approx(total, abs=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert VQToken.from_pretrained(tmp_path / "saved").config == model.config


def test_a_field_that_version_1_left_out_keeps_its_default_of_then(tmp_path: Path) -> None:
    VQToken().save_pretrained(tmp_path / "today")
    config = {"system": "vqtoken", "format_version": 1, "compat": "released"}
    model = VQToken.from_pretrained(write(tmp_path / "older", config, tmp_path / "today" / "model.safetensors"))
    assert (model.config.min_clusters, model.config.max_clusters, model.config.max_iterations) == (1, 256, 20)


def test_names_of_version_1_are_unknown_in_version_2_and_the_other_way_round(tmp_path: Path) -> None:
    VQToken().save_pretrained(tmp_path / "today")
    weights = tmp_path / "today" / "model.safetensors"
    with pytest.raises(ConfigError, match="unknown field 'codes'"):
        VQToken.from_pretrained(write(tmp_path / "a", {"system": "vqtoken", "format_version": 2, **PLAIN}, weights))
    folder = write(tmp_path / "b", {"system": "vqtoken", "format_version": 1, **PLAIN, "chose": "elbow"}, weights)
    with pytest.raises(ConfigError, match="unknown field 'chose'"):
        VQToken.from_pretrained(folder)


def test_both_spellings_of_color_are_read() -> None:
    assert encode_text("what colour was the ring ?") == encode_text("what color was the ring ?")


def test_a_released_compat_alone_has_the_published_values() -> None:
    for config in (VQTokenConfig(compat="released"), VQTokenConfig(compat="released_2025")):
        assert (config.min_clusters, config.max_clusters, config.max_iterations) == (12, 32, 50)
    plain = VQTokenConfig()
    assert (plain.min_clusters, plain.max_clusters, plain.max_iterations) == (1, 256, 20)
    few = VQTokenConfig(compat="released", max_clusters=8, max_iterations=7)
    assert (few.min_clusters, few.max_clusters, few.max_iterations) == (8, 8, 7)
    assert VQTokenConfig(compat="released", min_clusters=40).max_clusters == 40
