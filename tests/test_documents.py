"""Every block of Python and every command of the README and of docs/ runs as it stands, or says why it does not.

So does the Python of model cards, whose commands train and evaluate.

A block that is not run has a line before it: `<!-- not run: reason -->`. The blocks of a page run one after the other,
as a reader would try them, in a folder that has the shipped models and samples, and a few files under the names that
the pages use.
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2AudioForConditionalGeneration

from tests.media_files import film
from tests.multimodal.tiny_multimodal import stand_in_for_smollm2
from tests.multimodal.tiny_processors import save_qwen2_audio, save_qwen3
from tests.multimodal.tiny_vlms import Clip, Picture, encode, shared
from tokenthrift.attachment import families
from tokenthrift.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
REASON = r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?"
FENCE = re.compile(REASON + r"^```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    text: str
    reason: str | None


def blocks_of(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, m["kind"], m["text"], m["reason"]) for m in found]


def names(pages: list[Path], kind: str) -> list[Path]:
    return [p for p in pages if any(b.kind == kind and b.reason is None for b in blocks_of(p))]


def name_of(page: Path) -> str:
    """The name of a page, or of the model of a card."""
    return page.parent.name if page in CARDS else page.stem


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who reads along."""
    for name in ("model_cards", "samples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("media", "photos", "clips", "recordings", "interviews"):
        (tmp_path / name).mkdir()
    for name in ("media", "photos"):
        shutil.copy(ROOT / "samples/pictures/street.jpg", tmp_path / name)
    for name in ("media", "clips"):
        film(tmp_path / name / "clip.mp4", 16)
    film(tmp_path / "hours.mp4", 75)
    Image.open(ROOT / "samples/pictures/street.jpg").save(tmp_path / "picture.png")
    soundfile.write(tmp_path / "recording.wav", *soundfile.read(ROOT / "samples/speech/librivox-0880.flac"))
    for name in ("media", "recordings"):
        shutil.copy(ROOT / "samples/speech/librivox-0880.flac", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


STAND_INS = {"Qwen/Qwen3-VL-2B-Instruct": save_qwen3, "Qwen/Qwen2-Audio-7B-Instruct": save_qwen2_audio}


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts tiny random models of the same classes, with processors of their own, where pages name those of the Hub."""
    for owner in (AutoModelForImageTextToText, AutoProcessor, Qwen2AudioForConditionalGeneration):

        def load(name: str, *, load: Any = owner.from_pretrained) -> Any:
            place = folder / name
            return load(str(place) if place.exists() else STAND_INS[name](place))

        monkeypatch.setattr(owner, "from_pretrained", load)


@pytest.mark.parametrize("page", names([*PAGES, *CARDS], "python"), ids=name_of)
def test_the_python_of_a_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "attach":
        stand_in(monkeypatch, reader / "hub")
    if name_of(page) in ("window", "multimodal-tiny"):
        stand_in_for_smollm2(monkeypatch)
    # A page may register a family: it is known only while the page runs.
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    variables: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.kind != "python" or block.reason is not None:
            continue
        if "attach(model" in block.text:
            # What the text calls a live model, and its inputs.
            variables["model"] = shared("llava_onevision")
            variables["inputs"] = encode(variables["model"], [[10, Picture(1), Clip(2), 11]])
        text = block.text.replace("/tmp/", f"{reader}/out-")
        exec(compile(text, str(page), "exec", dont_inherit=True), variables)


@pytest.mark.parametrize("page", names(PAGES, "sh"), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks_of(page):
        if block.kind != "sh" or block.reason is not None:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "tokenthrift":
                assert main(words[1:]) == 0, f"{page.name}: {line}\n{capsys.readouterr().err}"
            else:
                assert is_proven(words), f"{page.name}: {line}"


def is_proven(words: list[str]) -> bool:
    """A target of the Makefile, or a script that is there; what they do has tests of its own."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return set(words[1:]) <= {*targets}
    return words[0] == "python" and (ROOT / words[1]).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_not_run_says_why(page: Path) -> None:
    for block in blocks_of(page):
        assert block.kind in ("python", "sh", "yaml", ""), f"{page.name}: a block of {block.kind}"
        if block.kind == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
        if block.reason is not None:
            assert len(block.reason) > 20


def test_every_page_is_in_the_navigation_and_links_lead_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.name != "README.md":
            assert f" {page.relative_to(ROOT / 'docs')}" in navigation, page.name
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


TEXTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    *CARDS,
    *ROOT.glob("recipes/*/README.md"),
]
SOURCES = [ROOT / root for root in ("multimodal", "tokenizers", "asr")]


def is_known(name: str) -> bool:
    """Whether the longest module of a dotted name says the word behind it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        inner = [root.joinpath(*parts[:length]) for root in SOURCES]
        files = [file for path in inner for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
        if files or any(path.is_dir() for path in inner):
            word = parts[length] if length < len(parts) else ""
            return any(re.search(rf"\b{word}\b", file.read_text(encoding="utf-8")) for file in files) or not word
    return False


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_modules_and_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [name for name in re.findall(r"\btokenthrift(?:\.\w+)+", text) if not is_known(name)] == []
    roots = "multimodal|tokenizers|asr|tests|recipes|benchmarks|docs|examples|model_cards|samples"
    files = re.findall(rf"`((?:{roots})/[\w./-]+)`", text)
    assert [file for file in files if "SYSTEM" not in file and not (ROOT / file).exists()] == []
