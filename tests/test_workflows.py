"""Workflows and forms of .github are valid, and call what the Makefile and pyproject.toml have."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = [path for path in FILES if path.parent.name == "workflows"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = re.compile(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def read(path: Path) -> dict[str, Any]:
    """A file's mapping; `on`, which YAML 1.1 takes for true, is called so again."""
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in found.items()}


def rows(job: dict[str, Any]) -> list[dict[str, str]]:
    """What a job's matrix gives its names, run by run."""
    matrix: dict[str, Any] = job.get("strategy", {}).get("matrix", {})
    plain = {name: values for name, values in matrix.items() if name != "include"}
    assert len(plain) <= 1, "no product of lists is read here"
    runs = [{name: value} for name, values in plain.items() for value in values]
    return [*runs, *matrix.get("include", [])] or [{}]


def filled(text: str, row: dict[str, str]) -> str:
    """A text with the names of a matrix filled in; one that the matrix lacks is a KeyError."""
    return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name: row[name[1]], text)


def steps(path: Path, key: str) -> list[str]:
    """All values of a step's key, of its inputs too, for every run of every job."""
    return [
        filled(value, row)
        for job in read(path)["jobs"].values()
        for row in rows(job)
        for step in job["steps"]
        for value in (step.get(key), step.get("with", {}).get(key))
        if value is not None
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_complete_and_calls_targets_that_there_are(path: Path) -> None:
    workflow = read(path)
    assert {"name", "on", "permissions", "jobs"} <= set(workflow)
    assert workflow["permissions"] == {"contents": "read"}, "the least; a job that needs more says so"
    for job in workflow["jobs"].values():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job)
        needs = job.get("needs", [])
        assert ({needs} if isinstance(needs, str) else set(needs)) <= set(workflow["jobs"])
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    called = [line.split() for text in steps(path, "run") for line in text.splitlines() if line.startswith("make ")]
    assert called
    assert {word for _, *words in called for word in words} <= TARGETS
    uses = re.findall(r"uses: .*", path.read_text(encoding="utf-8"))
    assert [line for line in uses if not PINNED.fullmatch(line)] == [], "a tag can be moved, a commit cannot"


def test_pythons_of_the_workflows_are_those_of_the_project() -> None:
    named = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)}
    first = min(named, key=lambda version: int(version.rpartition(".")[2]))
    assert PROJECT["project"]["requires-python"] == f">={first}"
    assert PROJECT["tool"]["mypy"]["python_version"] == first
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{first.replace('.', '')}"
    assert f"sys.version_info < ({first.replace('.', ', ')})" in MAKEFILE
    versions = {path.stem: set(steps(path, "python-version")) for path in WORKFLOWS}
    assert versions["test"] == named, "each version that the classifiers name is tested, and no other"
    assert versions["release"] == {first}


def test_a_release_reads_the_version_where_it_stands() -> None:
    (check,) = (text for text in steps(ROOT / ".github/workflows/release.yml", "run") if "GITHUB_REF_NAME" in text)
    (expression, file) = re.search(r"sed -n '(.*?)' (\S+?)\)", check).groups()  # type: ignore[union-attr]
    pattern = expression.removeprefix("s/").partition("/")[0].replace(r"\(", "(").replace(r"\)", ")")
    assert len(re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)) == 1
    assert PROJECT["tool"]["hatch"]["version"]["path"] == file


def test_every_target_is_explained_and_no_file() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    head = MAKEFILE.partition("\n\n")[0]
    assert set(phony.split()) == TARGETS
    assert set(re.findall(r"^# make (\w+)", head, re.MULTILINE)) == TARGETS - {"help"}


@pytest.mark.parametrize("path", [path for path in FILES if path not in WORKFLOWS], ids=lambda path: path.stem)
def test_forms_ask_for_something(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        assert all({"name", "url", "about"} == set(link) for link in form["contact_links"])
        return
    assert {"name", "description", "body"} <= set(form)
    parts = form["body"]
    assert {part["type"] for part in parts} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all("label" in part["attributes"] for part in parts if part["type"] != "markdown")
    names = [part["id"] for part in parts if part["type"] != "markdown"]
    assert len(set(names)) == len(names)
