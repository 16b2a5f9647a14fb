"""Each folder of model_cards is a complete Hub repository: metadata, card, hashes, and files that load anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils._validators import validate_repo_id
from transformers import AutoConfig

from tests.hub_server import HubServer
from tests.multimodal.tiny_hub import files_of
from tests.multimodal.tiny_multimodal import stand_in_for_smollm2
from tokenthrift.hub import push_folder
from tokenthrift.models import find, list_models, load

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
# Tasks of the Hub that the shipped models are for.
TASKS = {"automatic-speech-recognition", "image-feature-extraction", "video-text-to-text", "any-to-any"}
# What "Data and licenses" calls a data set, and its name on the Hub.
DATASETS = {
    "CIFAR-10": "uoft-cs/cifar10",
    "Common Voice": "mozilla-foundation/common_voice_6_1",
    "FSDD": "mteb/free-spoken-digit-dataset",
    "LibriSpeech": "openslr/librispeech_asr",
    "VCTK": "CSTR-Edinburgh/vctk",
    "speechocean762": "mispeech/speechocean762",
}
SECTIONS = ["Training", "Results", "Data and licenses", "Reproduce", "Files"]
SCREEN = 45  # lines of the first screen

pytestmark = pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_metadata_is_what_the_hub_accepts(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    data: dict[str, Any] = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "tokenthrift"
    assert data["pipeline_tag"] in TASKS
    assert all(isinstance(tag, str) and len(tag) <= 60 for tag in data["tags"])
    assert any(re.fullmatch(r"arxiv:\d{4}\.\d{5}", tag) for tag in data["tags"])
    for name in [*data.get("datasets", ()), *([data["base_model"]] if "base_model" in data else ())]:
        validate_repo_id(name)
        assert "/" in name
    results = card.data.eval_results
    assert results
    for result in results:
        assert result.task_type == data["pipeline_tag"]
        assert result.metric_type in data["metrics"] or result.metric_type == "tokens"
    # Reading and writing keeps it, so that the Hub's editor does not spoil it.
    again = ModelCard(str(card), ignore_metadata_errors=False)
    assert again.data.to_dict() == data  # type: ignore[no-untyped-call]


def test_data_sets_that_the_hub_has_are_in_the_metadata(folder: Path) -> None:
    """Those of the section about data; a card without any is of synthetic data, or of films that no repository has."""
    _, front, body = text_of(folder).split("---\n", 2)
    section = re.split(r"^## Data and licenses$", body, flags=re.MULTILINE)[1].partition("\n## ")[0]
    named = {DATASETS[name] for name in DATASETS if re.search(rf"\b{name}\b", section)}
    data = yaml.safe_load(front)
    assert named == set(data.get("datasets", ()))
    assert named or "synthetic" in data["tags"]


def test_figures_of_the_metadata_stand_in_the_card_with_a_command(folder: Path) -> None:
    text = text_of(folder)
    body = text.split("---\n", 2)[2]
    for model in yaml.safe_load(text.split("---\n")[1])["model-index"]:
        assert model["name"] == folder.name
        for result in model["results"]:
            for metric in result["metrics"]:
                assert re.search(rf"(?<![\d.]){re.escape(str(metric['value']))}(?!\d)", body), metric
    results = body[body.index("## Results") :]
    assert re.search(r"`(tokenthrift evaluate|python (benchmarks|recipes)/)", results)


def test_the_first_screen_says_the_main_thing(folder: Path) -> None:
    """What it is, lines to run, what it is for and not for, one picture and one table; the rest comes later."""
    lines = text_of(folder).split("---\n", 2)[2].partition("\n## ")[0].splitlines()
    assert len(lines) <= SCREEN
    screen = "\n".join(lines)
    assert lines[0] == f"# {folder.name}"
    assert "```python" in screen
    assert len(re.findall(r"!\[[^\]]+\]\([^)]+\)", screen)) == 1
    assert len(re.findall(r"^\|[ :|-]+\|$", screen, re.MULTILINE)) == 1, "one table"
    assert "**For** " in screen
    assert "**Not for** " in screen
    assert re.search(r"\d \%|\d tokens", screen)
    assert sum(line.startswith("|") for line in lines) <= 16
    headings = re.findall(r"^## (.+)$", text_of(folder), re.MULTILINE)
    assert all(section in headings for section in SECTIONS)


def test_links_and_pictures_are_there(folder: Path) -> None:
    for page in folder.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (folder / target).is_file(), target


def test_hashes_hold(folder: Path) -> None:
    command = [sys.executable, str(ROOT / ".ci" / "hashes.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"{folder.name}/SHA256SUMS" not in done.stdout
    names = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {"config.json", "model.safetensors"} <= names


def test_it_loads_as_a_folder_elsewhere_and_from_the_hub(
    folder: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_smollm2(monkeypatch)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    own = load(elsewhere)
    assert sum(parameter.numel() for parameter in own.parameters()) > 1_000_000
    push_folder(elsewhere, f"o/{folder.name}")
    assert set(files_of(folder)) <= set(hub.repositories[f"o/{folder.name}"].commits.popitem()[1])
    cache: Any = tmp_path / "cache"
    hub.add(f"o/{folder.name}", files_of(folder))
    pulled = load(f"o/{folder.name}", cache_dir=cache)
    for (name, tensor), (same, other) in zip(own.named_parameters(), pulled.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(tensor, other)
    assert f"o/{folder.name}" in list_models(tmp_path, cache_dir=cache)
    assert AutoConfig.from_pretrained(elsewhere).model_type == f"tokenthrift_{own.system}"


def test_files_for_processors_are_those_that_saving_writes(folder: Path) -> None:
    import json

    for name, fields in find(folder).model.processor_files().items():
        assert json.loads((folder / name).read_text(encoding="utf-8")) == fields
