"""Every command that a page shows is one that its program understands, and a recipe's files come from its own commands.

The pages are README.md, docs/, the model cards and the READMEs of recipes; `test_documents.py` also runs the commands
of the first two. Nothing runs here: shells and parsers read what is written.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import option_parsers
from tests.page_commands import BLOCK, PAGES, ROOT, Command, inline_commands, shell_commands

RECIPES = [page for page in PAGES if page.parent.parent.name == "recipes"]
# Programs that come with a system, or whose installation the page shows.
PROGRAMS = {"cat", "find", "git", "grep", "hf", "mkdir", "pip", "sed", "unzip"}
OWN = ("recipes", "benchmarks", "model_cards", "samples", "docs", "examples", "tests")
MADE = ("data/", "runs/", "models/")
# Data that a page leaves to the reader beside what its text names.
GIVEN = {"karl": {"data/imagenet100"}}


def name_of(page: Path) -> str:
    return page.parent.name if page.name == "README.md" and page.parent != ROOT else page.stem


@cache
def understood(command: Command) -> argparse.Namespace:
    """The arguments of a command of ours; those of other programs are not looked at."""
    program, *words = command.words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "tokenthrift" and words[0] == "fit":
        run = option_parsers.recipe(words[1:], ROOT)
        option_parsers.check_recipe(run)
        return argparse.Namespace(run=run)
    elif program == "tokenthrift":
        return option_parsers.command(words, whole=command.whole)
    elif program == "python" and words[0] == "-c":
        ast.parse(words[1])
    elif program == "python" and words[0] == "-m":
        name = words[1].split(".")
        if name[0] == "tokenthrift":
            path = ROOT.joinpath("tokenizers", *name).with_suffix(".py")
            path = path if path.is_file() else ROOT.joinpath("multimodal", *name).with_suffix(".py")
            return option_parsers.script(path, words[2:], whole=command.whole)
        assert name[0] in ("lmms_eval", "venv")
    elif program == "python":
        path = ROOT / command.path(words[0])
        assert path.is_file(), words[0]
        return option_parsers.script(path, words[1:], whole=command.whole)
    else:
        assert program in PROGRAMS, program
    return argparse.Namespace()


def paths_of(command: Command) -> Iterator[str]:
    """Paths among the words of a command, as they are called from the root; lists and NAME=PATH are taken apart."""
    for word in (word for word in command.words[1:] if not word.startswith("-")):
        for part in re.split(r"[=,\[\]\s]+", word):
            path = command.path(part)
            if path.startswith((*MADE, *(f"{own}/" for own in OWN))):
                yield path


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tokenthrift evaluate karl --model a --data b --out c --epsilon 0.1", "unrecognized arguments: --epsilon"),
        ("tokenthrift convert karl last.ckpt", "required: OUT"),
        ("tokenthrift train", "assert|reads no arguments"),
        ("tokenthrift fit --config recipes/karl/tiny_base.yaml --trainer.max_step 3", "max_step"),
        ("tokenthrift fit --config recipes/karl/tiny_base.yaml --model.init_args.config.channel 3", "channel"),
        ("tokenthrift fit --config recipes/karl/large.yaml", "large.yaml"),
        ("python recipes/dllm_asr/average.py mean.ckpt", "required: checkpoints"),
        ("python recipes/dllm_asr/mean.py mean.ckpt", "mean.py"),
        ("make everything", "everything"),
        ("whisper recording.wav", "whisper"),
        ("cat $NOWHERE", "NOWHERE: unbound variable"),
    ],
)
def test_a_command_that_would_fail_is_found(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"```sh\n{text}\n```\n")
    with pytest.raises(Exception, match=complaint):
        understood(*shell_commands(tmp_path / "page.md"))


def test_blocks_of_a_page_are_one_script(tmp_path: Path) -> None:
    first = 'D=data; for S in dev test; do\n    cat a "$S b" > $D/$S.txt  # both\ndone\ncd inner'
    text = (
        f"```sh\n{first}\n```\ntaken out: `taskset -c 1 python recipes/a.py ... --b`\n```sh\npython ../$D/x.py\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    *both, last = shell_commands(tmp_path / "page.md")
    assert both == [Command(("cat", "a", f"{name} b"), into=f"data/{name}.txt") for name in ("dev", "test")]
    assert last.path(last.words[1]) == "data/x.py"
    assert inline_commands(tmp_path / "page.md") == [Command(("python", "recipes/a.py", "--b"), whole=False)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood_and_name_files_that_are_there(page: Path) -> None:
    for command in shell_commands(page) + inline_commands(page):
        try:
            understood(command)
        except Exception as error:
            raise AssertionError(f"{' '.join(command.words)}: {error}") from error
        for path in paths_of(command):
            assert path.startswith(MADE) or (ROOT / path).exists() or path in writes(command), path


def writes(command: Command) -> set[str]:
    """Files and folders that a command makes."""
    program, *words = command.words
    found = set() if command.into is None else {command.path(command.into)}
    if program in ("pip", "unzip") and "-d" in words:
        found.add(command.path(words[words.index("-d") + 1]))
    if program in ("tokenthrift", "python"):
        given = vars(understood(command))
        found |= {command.path(str(given[name])) for name in ("out", "table", "rows") if given.get(name)}
        if run := given.get("run"):
            trainer: dict[str, Any] = run["trainer"]
            found |= {trainer["default_root_dir"]}
            found |= {c["init_args"]["dirpath"] for c in trainer["callbacks"] if "dirpath" in (c["init_args"] or {})}
        if program == "tokenthrift" and words[0] == "convert":
            found.add(command.path(words[-1]))
    return found


def strings(node: Any) -> Iterator[str]:
    """All strings of plain data."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for part in [*node, *node.values()] if isinstance(node, dict) else node:
            yield from strings(part)


def reads(command: Command) -> set[str]:
    """Files that a command takes: those among its words, and those of its recipe."""
    found = {path for path in paths_of(command) if path.startswith(MADE)}
    if command.words[:2] == ("tokenthrift", "fit"):
        run = understood(command).run
        found |= {text for text in strings([run["model"], run["data"]]) if text.startswith(MADE)}
    return set() if command.words[0] == "mkdir" else found - writes(command)


@pytest.mark.parametrize("page", RECIPES, ids=name_of)
def test_what_a_command_of_a_recipe_reads_was_made_before_or_is_named_in_the_text(page: Path) -> None:
    """A stranger starts from nothing but what the text asks for."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    there = set(re.findall(r"`((?:data|runs|models)/[\w./-]+)`", prose)) | GIVEN.get(page.parent.name, set())
    for command in shell_commands(page):
        for path in reads(command):
            known = any(path == own or path.startswith(f"{own}/") or own.startswith(f"{path}/") for own in there)
            assert known, f"{' '.join(command.words)}: nothing before it makes {path}"
        there |= writes(command)


@pytest.mark.parametrize("page", RECIPES, ids=name_of)
def test_every_script_and_recipe_of_a_folder_is_on_a_page(page: Path) -> None:
    text = "".join(other.read_text(encoding="utf-8") for other in PAGES)
    imported = {
        name
        for path in page.parent.glob("*.py")
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    files = [*page.parent.glob("*.yaml"), *(p for p in page.parent.glob("*.py") if p.stem not in imported)]
    assert [path.name for path in files if path.name not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_leaves_the_loggers_to_the_command(path: Path) -> None:
    """They are a CSV file and TensorBoard; a recipe with a logger of its own would leave one of them out."""
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"].get("logger", True) is True
