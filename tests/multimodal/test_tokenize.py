"""`tokenthrift tokenize` and `plan` on folders of pictures, some of them broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub_server import HubServer
from tests.media_files import film, write
from tests.tokenizers.karl.tiny_karl import TOKENS, tiny_config, tiny_karl
from tokenthrift.budget import BudgetSupport, ItemSize, NativeCost, TokenUsage
from tokenthrift.cli import main
from tokenthrift.hub import HubModel
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.model import Karl
from tokenthrift.media.image import read_image
from tokenthrift.registry import SYSTEMS, System
from tokenthrift.vqtoken import VQToken
from tokenthrift.vqtoken.config import VQTokenConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square model, three pictures (one larger than the model's), a broken one, a text, and a picture below."""
    folder = tmp_path_factory.mktemp("tokenize")
    tiny_karl(tiny_config(grid=(4, 4)), decisive=True).save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    (folder / "in" / "sub").mkdir(parents=True)
    for name, size in (("a.png", (16, 16)), ("b.png", (40, 30)), ("sub/c.png", (16, 16))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "in" / name)
    (folder / "in" / "broken.jpg").write_bytes((folder / "in" / "a.png").read_bytes()[:200])
    (folder / "in" / "notes.txt").write_text("not a picture")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path | int) -> tuple[int, dict[str, Any], str]:
    """Exit code, rows by file name, and what stderr says."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    return code, {Path(row["file"]).name: row for row in rows}, captured.err


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Karl.from_pretrained(folder / "model")
    code, rows, log = run(
        capsys, "tokenize", folder / "in", "--model", folder / "model", "--budget", "e0.1", "--codes", "--batch-size", 2
    )
    assert code == 1
    assert list(rows) == ["a.png", "b.png", "broken.jpg", "c.png"]
    assert "failed" in rows["broken.jpg"]
    assert "broken.jpg" in log
    assert "3 images: " in log
    assert "1 failed" in log
    image = read_image(folder / "in" / "a.png")[None]
    tokens = model.encode(image, "e0.1")
    assert tokens.codes is not None
    error = (model.decode(tokens) - image).abs().mean().item()
    row = rows["a.png"]
    assert row["codes"] == tokens.codes[0].tolist()
    assert row["error"] == pytest.approx(error, abs=1e-5)
    assert (row["native"], row["cap"], row["tokens"]) == (TOKENS, TOKENS, tokens.usage[0].used)
    assert row["bits"] == BitFormat.of(model.config).string_bits([row["tokens"]])
    assert torch.equal(model.from_codes([row["codes"]]).embeddings, tokens.embeddings)


def test_budgets_in_tokens_and_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = (folder / "in" / "a.png", folder / "in" / "b.png", "--model", folder / "model")
    code, rows, _ = run(capsys, "tokenize", *at, "--budget", "5")
    assert (code, [row["tokens"] for row in rows.values()]) == (0, [5, 5])
    code, rows, _ = run(capsys, "tokenize", *at, "--max-bits", "80")
    assert code == 0
    assert all(70 < row["bits"] <= 80 for row in rows.values())
    code, rows, _ = run(capsys, "tokenize", *at, "--budget", "8,e0.001", "--verify")
    assert code == 0
    assert {(row["result"], row["tokens"] <= 8, row["decoder_passes"]) for row in rows.values()} == {
        ("best_effort", True, 2)
    }


def test_a_plan_bounds_what_is_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = (folder / "in", "--model", folder / "model", "--budget", "50%,e0.1")
    code, planned, log = run(capsys, "plan", *at, "--json")
    _, used, _ = run(capsys, "tokenize", *at)
    assert code == 0  # the header of the broken one says its size, which is all that a plan reads
    assert "at most" in log
    for name, row in planned.items():
        assert row["cap"] == TOKENS // 2
        if name == "broken.jpg":
            continue
        assert row["cap"] == used[name]["cap"] == TOKENS // 2
        assert used[name]["tokens"] <= row["cap"]


def test_plan_reads_no_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    code, rows, _ = run(
        capsys, "plan", "--json", folder / "in" / "a.png", "--model", tmp_path / "model", "--budget", "3"
    )
    assert (code, rows["a.png"]["cap"]) == (0, 3)


def test_lines_go_to_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokens.jsonl"
    code, rows, _ = run(capsys, "tokenize", folder / "in" / "a.png", "--model", folder / "model", "--out", out)
    assert (code, rows) == (0, {})
    assert json.loads(out.read_text())["tokens"] == TOKENS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["missing.png"], "no such file"),
        (["--budget", "0"], "max_tokens"),
        (["--budget", "12.5/s"], "tokens_per_second"),
        (["--calibrated"], "calibrat"),
        (["--verify"], "target_error"),
        (["--max-bits", "20"], "at least"),
        (["--device", "cuda:99"], "--device"),
    ],
)
def test_wrong_usage(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    code, rows, log = run(capsys, "tokenize", folder / "in" / "a.png", *arguments, "--model", folder / "model")
    assert (code, rows) == (2, {})
    assert reason in log


def test_help_and_other_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (([], "--model MODEL --help"), (["--model", str(folder / "model")], "--verify")):
        with pytest.raises(SystemExit) as caught:
            main(["tokenize", *arguments, "--help"])
        assert caught.value.code == 0
        assert words in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"system": "dllm_asr", "format_version": 1}')
    code, _, log = run(capsys, "tokenize", folder / "in", "--model", tmp_path)
    assert code == 2
    assert "makes no tokens of files" in log


def test_models_that_exist_only_at_a_revision(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "model"
    hub.add("org/karl", {path.name: path.read_bytes() for path in model.iterdir()}, branch="v2")
    of = (folder / "in" / "a.png", "--model", "org/karl", "--revision", "v2", "--budget", "3")
    assert run(capsys, "plan", *of, "--json")[0] == 0
    assert run(capsys, "plan", *of, "--model", model, "--json")[0] == 0, "a folder beside it has no revisions"
    assert run(capsys, "tokenize", *of)[0] == 0
    code, _, log = run(capsys, "plan", *of[:3], "--revision", "v3", "--json")
    assert (code, "org/karl has no revision 'v3'" in log) == (2, True)


@dataclass(frozen=True)
class SpeechConfig:
    rate: int = 3


class Speech(HubModel):
    """Hears windows of 10 s, and keeps a third of its 50 states a second."""

    system = "speech"
    config_class = SpeechConfig
    support: ClassVar[BudgetSupport] = BudgetSupport(fields=frozenset({"max_tokens"}))
    native_cost: ClassVar[NativeCost] = NativeCost(per_second=50)
    max_seconds = 10.0

    def plan(self, items: Sequence[ItemSize], budget: Any = None) -> tuple[TokenUsage, ...]:
        found = []
        for item in items:
            native = round(item.require("seconds") * 50)
            found.append(TokenUsage(native=native, cap=native // 3, used=native // 3))
        return tuple(found)


def test_a_mixed_folder_is_priced_by_every_model_that_reads_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures, a clip, a recording and a talking video; what a model does not read is named."""
    speech = System(name="speech", model=f"{__name__}:Speech", files="tokenthrift.transcription.files:SpeechFiles")
    monkeypatch.setitem(SYSTEMS, "speech", speech)
    models = {"karl": folder / "model", "vqtoken": tmp_path / "clips", "speech": tmp_path / "speech"}
    VQToken(VQTokenConfig()).save_pretrained(models["vqtoken"])
    Speech(SpeechConfig()).save_pretrained(models["speech"])
    media = tmp_path / "media"
    media.mkdir()
    (media / "a.png").write_bytes((folder / "in" / "a.png").read_bytes())
    write(media / "b.wav", np.zeros(16_000 * 45, np.float32))
    film(media / "c.mp4", 16)
    (media / "notes.txt").write_text("nothing to see")
    arguments = [str(part) for model in models.values() for part in ("--model", model)]
    assert main(["plan", str(media), *arguments, "--frames", "4", "--json"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    priced = {(Path(row["file"]).name, row["model"]): row for row in rows}
    assert len(rows) == 3, "one that another model reads is not left out"
    read = {key: row["native"] for key, row in priced.items() if "native" in row}
    assert set(read) == {
        ("a.png", str(models["karl"])),
        ("b.wav", str(models["speech"])),
        ("c.mp4", str(models["vqtoken"])),
    }
    assert read["b.wav", str(models["speech"])] == 45 * 50
    assert priced["b.wav", str(models["speech"])]["cap"] == 4 * 166 + 83, (
        "windows of 10 s and a rest, each reduced to a third"
    )
    assert "left out" not in captured.err
    assert "1 other file without picture or sound" in captured.err
    assert main(["plan", str(media), *arguments]) == 0
    table = capsys.readouterr().out
    assert "at most" in table
    assert "2,250" in table
    assert main(["plan", str(media), *arguments, "--budget", "e0.1"]) == 2, "a ceiling that one does not honor"
    assert main(["plan", str(media), *arguments[:4], "--frames", "4", "--json"]) == 0
    captured = capsys.readouterr()
    (left_out,) = [row for row in map(json.loads, captured.out.splitlines()) if "left_out" in row]
    assert left_out["file"] == str(media / "b.wav")
    assert left_out["left_out"] == "a recording; the model reads images; a recording; the model reads videos"
    assert captured.err.endswith("1 left out\n")
