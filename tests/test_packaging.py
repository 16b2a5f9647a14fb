"""The distribution: source roots that shadow nothing, a wheel that works elsewhere, and dependencies as declared."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / root / "tokenthrift" for root in ("multimodal", "tokenizers", "asr")]
MODULES = [path for source in SOURCES for path in sorted(source.rglob("*.py"))]
VERSION = (ROOT / "multimodal/tokenthrift/version.py").read_text().split('"')[-2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules that whoever imports them has installed the extra `train` for: every `training` package, and these.
FOR_TRAINING = ("tokenthrift.vqtoken.synthetic.module", "tokenthrift.vqtoken.video_lm.module")
# What cannot be imported without that extra, because it uses a module that belongs to it.
USES_TRAINING = (
    "tokenthrift.dllm_asr.convert",
    "tokenthrift.vqtoken.evaluation.evaluate",
    "tokenthrift.vqtoken.synthetic.data",
    "tokenthrift.vqtoken.video_lm.data",
)
LIGHT = [f"tokenthrift.{name}" for name in ["cli", "dllm_asr", "karl", "mtsk", "reducers", "transcription", "vqtoken"]]


def python(*arguments: str | Path, cwd: Path, path: Path | None = None, isolated: bool = False) -> str:
    """Runs Python with nothing of this checkout on its path but what is given, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *(["-S"] if isolated else []), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Source roots


def test_from_the_root_tokenizers_is_hugging_faces() -> None:
    """The folder `tokenizers/` lies in the current directory, first on the path, and must not win."""
    code = (
        "import sys, tokenizers, transformers; from transformers import PreTrainedTokenizerFast; "
        "print(sys.path[0] == ''); print(tokenizers.__file__); print(tokenizers.Tokenizer.__name__)"
    )
    first, file, name = python("-c", code, cwd=ROOT).split()
    assert (first, name) == ("True", "Tokenizer")
    assert Path(file).is_relative_to(Path(sysconfig.get_path("platlib")).resolve())


def test_one_root_makes_the_package_and_finds_the_others() -> None:
    """A second `__init__.py` would be lost in the wheel; the one that there is must not hide the other roots."""
    for source in SOURCES:
        assert source.is_dir()
        assert not (source.parent / "__init__.py").exists()
        assert (source / "__init__.py").exists() == (source.parent.name == "multimodal")
        assert (source / "py.typed").is_file()
    for roots in (SOURCES, SOURCES[::-1]):
        path = Path(os.pathsep.join(str(source.parent) for source in roots))
        code = "import tokenthrift.budget, tokenthrift.karl, tokenthrift.transcript; print(tokenthrift.__version__)"
        assert python("-c", code, cwd=ROOT, path=path).strip() == VERSION


def test_no_module_is_in_two_roots() -> None:
    """The wheel merges the roots, so a second file of one name would be lost."""
    names = [path.relative_to(source) for source in SOURCES for path in source.rglob("*.py")]
    assert len(names) == len(set(names))


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user would, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("elsewhere")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_all_sources_once_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    packed = {name for name in names if ".dist-info/" not in name}
    sources = {f"tokenthrift/{path.relative_to(source)}" for source in SOURCES for path in source.rglob("*.py")}
    assert packed == {*sources, "tokenthrift/py.typed"}
    metadata = {name.split("/", 1)[1] for name in names if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= metadata


def test_the_installed_wheel_runs_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    """-S leaves out site-packages and with it the editable install: only the wheel's own copy can be found."""
    shown = python("-m", "tokenthrift.cli", "--help", cwd=tmp_path, path=elsewhere, isolated=True)
    assert shown.startswith("usage: tokenthrift COMMAND")
    assert "transcribe" in shown
    program = elsewhere / "bin" / "tokenthrift"
    assert python(program, "--help", cwd=tmp_path, path=elsewhere, isolated=True) == shown
    assert python(program, "--version", cwd=tmp_path, path=elsewhere, isolated=True) == f"tokenthrift {VERSION}\n"
    code = "import tokenthrift.budget as module; print(module.__file__)"
    assert Path(python("-c", code, cwd=tmp_path, path=elsewhere, isolated=True).strip()).is_relative_to(elsewhere)


@pytest.mark.timeout(300)
def test_every_module_of_the_wheel_imports_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    """All of them in one process, from the wheel; at import only what trains asks for an optional dependency."""
    code = f"""
import builtins, importlib, pkgutil, sys
sys.path[:] = [{str(elsewhere)!r}, *[p for p in sys.path if p not in {[str(source.parent) for source in SOURCES]!r}]]
optional, training, plain_import = {import_names(optional())!r}, {import_names(extra("train"))!r}, builtins.__import__

def guarded(name, globals=None, *rest, **named):
    ours = ((globals or {{}}).get("__name__") or "").startswith("tokenthrift")
    path = ours and globals["__name__"]
    own = training if path in {FOR_TRAINING!r} or ".training" in str(path) else set()
    if ours and name.partition(".")[0] in optional - own:
        raise ImportError(f"{{globals['__name__']}} imports {{name}}")
    return plain_import(name, globals, *rest, **named)

builtins.__import__ = guarded
import tokenthrift
tokenthrift.__path__[:] = [{str(elsewhere / "tokenthrift")!r}]
modules = [m.name for m in pkgutil.walk_packages(tokenthrift.__path__, "tokenthrift.")]
for name in modules:
    file = importlib.import_module(name).__file__
    assert file.startswith({str(elsewhere)!r}), file
print(len(modules))
"""
    assert int(python("-c", code, cwd=tmp_path)) == len(MODULES) - 1  # `tokenthrift` itself is not counted


# Dependencies


def core() -> set[str]:
    return {str(canonicalize_name(Requirement(line).name)) for line in PROJECT["dependencies"]}


def extra(name: str) -> set[str]:
    return {str(canonicalize_name(Requirement(line).name)) for line in PROJECT["optional-dependencies"][name]}


def optional() -> set[str]:
    return set().union(*map(extra, PROJECT["optional-dependencies"])) - core() - {"tokenthrift"}


def dotted(path: Path) -> str:
    (source,) = (source for source in SOURCES if path.is_relative_to(source))
    return ".".join(path.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__")


def is_for_training(module: str) -> bool:
    return "training" in module.split(".") or module in FOR_TRAINING


@cache
def owners() -> dict[str, set[str]]:
    """Every installed top-level import name, and the distributions that it comes from."""
    return {
        module: {str(canonicalize_name(name)) for name in names} for module, names in packages_distributions().items()
    }


def import_names(distributions: set[str]) -> set[str]:
    """Top-level import names of distributions."""
    return {module for module, names in owners().items() if names & distributions}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level names that a file imports, and whether at its import or only later (in a function or for types)."""

    def walk(node: ast.AST, later: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            deferred = later or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                deferred = True
            if isinstance(child, ast.Import):
                yield from ((alias.name.partition(".")[0], later) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.level == 0:
                yield (child.module or "").partition(".")[0], later
            yield from walk(child, deferred)

    return walk(ast.parse(path.read_text(encoding="utf-8")), False)


@pytest.mark.parametrize(
    "path", [p for s in SOURCES for p in sorted(s.rglob("*.py"))], ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_imports_are_declared_and_optional_ones_come_late(path: Path) -> None:
    for name, later in imports(path):
        if name in sys.stdlib_module_names or name == "tokenthrift":
            continue
        allowed = core() | (optional() if later else extra("train") if is_for_training(dotted(path)) else set())
        assert owners().get(name, {name}) & allowed, (
            f"{path}: {name} is not declared, or optional and imported too early"
        )


def test_only_training_needs_the_extra_train(tmp_path: Path) -> None:
    """With nothing of that extra to be had, every other module imports, and so do the models that packages name."""
    needless = [name for path in MODULES if not is_for_training(name := dotted(path)) and name not in USES_TRAINING]
    code = f"""
import sys
from importlib import import_module
sys.modules |= dict.fromkeys({sorted(import_names(extra("train")))!r})
for name in {needless!r}:
    import_module(name)
from tokenthrift.registry import SYSTEMS, resolve
for system in SYSTEMS.values():
    for target in filter(None, (system.model, system.files, system.evaluator)):
        resolve(target)
for name in {USES_TRAINING!r}:
    try:
        import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{{name}} does not need the extra")
"""
    python("-c", code, cwd=tmp_path, path=Path(os.pathsep.join(str(source.parent) for source in SOURCES)))


def test_without_any_extra_recordings_pictures_and_tokens_are_worked_on(tmp_path: Path) -> None:
    """What `pip install tokenthrift` brings is enough for transcription of any sample rate, KARL and reducers."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({sorted(import_names(optional()))!r})
import soundfile, torch
from tokenthrift.media.audio import read_audio
from tokenthrift.models import load
from tokenthrift.reducers import BipartiteMerging
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken import VQToken
soundfile.write("a.wav", torch.randn(44_100).numpy() * 0.1, 44_100)
found = load({str(ROOT / "model_cards" / "dllm-asr-tiny-en")!r}).transcribe([read_audio("a.wav")])
print(found[0].usage.native)
for reducer in (BipartiteMerging(), VQToken()):
    print(reducer.reduce(TokenBatch.from_items([torch.randn(9, 4)]), 3).usage[0].used)
print(load({str(ROOT / "model_cards" / "karl-tiny-64")!r}).encode(torch.rand(1, 3, 64, 64), 5).usage[0].cap)
"""
    path = Path(os.pathsep.join(str(source.parent) for source in SOURCES))
    assert python("-c", code, cwd=tmp_path, path=path).split() == ["50", "3", "3", "5"]


@pytest.mark.parametrize("name", LIGHT)
def test_importing_a_package_loads_nothing_heavy_beside_torch(name: str, tmp_path: Path) -> None:
    heavy = {"jsonargparse", "lightning", "matplotlib", "pytorch_lightning", "scipy", "torchmetrics", "transformers"}
    code = f"import sys, {name}; print(*sorted({heavy!r} & set(sys.modules)))"
    path = Path(os.pathsep.join(str(source.parent) for source in SOURCES))
    assert python("-c", code, cwd=tmp_path, path=path).split() == []


@pytest.mark.parametrize("name", ["tokenthrift.budget", "tokenthrift.config", "tokenthrift.extras", "tokenthrift.cli"])
def test_the_light_modules_need_no_dependency_at_all(name: str) -> None:
    python("-c", f"import {name}", cwd=ROOT, path=ROOT / "multimodal", isolated=True)


def test_constraints_pin_every_declared_dependency_without_an_address() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9a-z.]+", line) for line in lines)
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    # The extra `demo` asks for older pillow and tomlkit, and has no pins; CI installs it in an environment of its own.
    declared = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "demo"}
    extras = [line for extra in declared.values() for line in extra]
    for line in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(line)
        if requirement.name != "tokenthrift":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_the_extra_all_brings_everything_but_the_tests_tools() -> None:
    declared = PROJECT["optional-dependencies"]
    (everything,) = declared["all"]
    assert Requirement(everything).extras == set(declared) - {"all", "test", "demo"}


# What runs the tests


def test_ci_removes_only_the_environment_that_it_made(tmp_path: Path) -> None:
    """With a `make` that only leaves traces, succeeding or not."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin" / "make"
    make.write_text('#!/bin/sh\necho "$@" >> calls\nmkdir -p "${2#VENV=}"\nexit "$(cat status)"\n')
    make.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(status: int, **more: str) -> int:
        (tmp_path / "status").write_text(str(status))
        command = ["bash", str(tmp_path / ".ci" / "run")]
        return subprocess.run(command, env={**environment, **more}, cwd="/", timeout=20, check=False).returncode

    other = tmp_path / "other place"
    for status in (0, 2):
        assert run(status) == status
        assert not (tmp_path / ".venv").exists()
        assert run(status, VENV=str(other)) == status
        assert not other.exists()
    (tmp_path / ".venv").mkdir()
    other.mkdir()
    assert run(0) == 0
    assert run(0, VENV=str(other)) == 0
    assert (tmp_path / ".venv").is_dir()
    assert other.is_dir()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert set(calls) == {"test VENV=.venv", f"test VENV={other}"}


def test_the_makefile_explains_itself() -> None:
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
    assert shown.startswith("make demo")
    assert "VENV=" in shown
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", shown, re.MULTILINE)) == {*targets.split()} - {"help"}


def test_the_makefile_installs_where_it_says() -> None:
    """`python -m uv` installs into its own environment whatever VIRTUAL_ENV says, so every line names a Python."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    installing = [line for line in lines if "uv pip install" in line]
    assert len(installing) >= 7
    assert all("$(BIN)/uv pip install --python $(" in line for line in installing)


def test_the_citation_has_the_version_of_the_package() -> None:
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    (stated,) = re.findall(r'__version__ = "(.+)"', (ROOT / "multimodal/tokenthrift/version.py").read_text())
    assert cited == stated
