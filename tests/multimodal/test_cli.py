"""The command's table, help and exit codes; `info` and `push`."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from torch import nn

from tests.hub_server import HubServer
from tokenthrift import cli, models
from tokenthrift.budget import BudgetSupport, NativeCost
from tokenthrift.hub import ConfigError, HubModel
from tokenthrift.registry import SYSTEMS, System, resolve

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Sizes:
    width: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 4096:
            raise ConfigError(f"width must be within 1 and 4096, not {self.width}")


@dataclass(frozen=True)
class SmallConfig:
    sizes: Sizes = Sizes()
    name: str = "small"


class Small(HubModel):
    system = "small"
    config_class = SmallConfig
    config: SmallConfig
    support: ClassVar[BudgetSupport] = BudgetSupport(fields=frozenset({"max_tokens", "retention"}), nested=True)
    native_cost = NativeCost(per_second=12.5, per_frame=4)

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        self.net = nn.Linear(config.sizes.width, 100)

    def transcribe(self) -> None:
        pass


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model of a system that this release knows."""
    monkeypatch.setitem(SYSTEMS, "small", System(name="small", model=f"{__name__}:Small"))
    Small(SmallConfig()).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tokenthrift COMMAND [OPTIONS]\n")
    for group in cli.COMMANDS.values():
        for name, (_, text) in group.items():
            assert f"  {name:<12}{text}\n" in shown
    assert max(map(len, shown.splitlines())) <= 110


@pytest.mark.parametrize("target", [t for group in cli.COMMANDS.values() for t, _ in group.values()])
def test_every_command_in_the_table_exists(target: str) -> None:
    assert callable(resolve(target))


# Test helpers add recognisers of their own to the table.
OWN = [s for s in SYSTEMS.values() if not (s.model or "").startswith("tests.")]


@pytest.mark.parametrize("system", OWN, ids=lambda system: system.name)
def test_everything_in_the_table_of_systems_is_there(system: System) -> None:
    assert SYSTEMS[system.name] is system
    if system.model is not None:
        model = resolve(system.model)
        assert issubclass(model, HubModel)
        assert model.system == system.name
    for target in (system.converter, system.files, system.evaluator):
        assert target is None or callable(resolve(target))
    if system.files is not None:
        assert {"noun", "suffixes", "add_options", "plan"} <= set(dir(resolve(system.files)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "usage: tokenthrift COMMAND"),
        (["transcribee"], "unknown command 'transcribee'; did you mean 'transcribe'?"),
        (["xyzzy"], "unknown command 'xyzzy'; see `tokenthrift --help`"),
        (["--verbose"], "unknown option '--verbose'"),
    ],
)
def test_wrong_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["fit", "--config", "recipe.yaml"],
        ["evaluate", "vqtoken", "--model", "m", "--data", "d", "--out", "o"],
        ["convert", "dllm_asr", __file__, "out"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_command_without_its_extra_says_which_one_to_install(argv: list[str]) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['jsonargparse', 'lightning', 'pytorch_lightning']); "
        f"from tokenthrift.cli import main; sys.exit(main({argv!r}))"
    )
    roots = os.pathsep.join(str(ROOT / root) for root in ("multimodal", "tokenizers", "asr"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": roots},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'tokenthrift[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_module_that_no_extra_brings_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_nonesuch.py").write_text("import nonesuch\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nonesuch"):
        resolve("needs_nonesuch:main")


def test_arguments_and_exit_code_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"count": (f"{__name__}:count", "count"), "stop": (f"{__name__}:stop", "stop")}
    monkeypatch.setitem(cli.COMMANDS, "Test", group)
    assert cli.main(["count", "a", "--b", "c"]) == 3
    assert cli.main(["stop"]) == 130
    monkeypatch.setattr(sys, "argv", ["tokenthrift", "count", "a"])
    assert cli.main() == 1


def count(argv: list[str]) -> int:
    return len(argv)


def test_a_reader_who_stops_ends_a_command_quietly() -> None:
    code = "import sys; from tokenthrift import cli; sys.stdin.read(); sys.exit(cli.main(['fit', '--help']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "multimodal")}
    pipe = subprocess.PIPE
    done = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, stderr=pipe)
    assert done.stdin is not None
    assert done.stdout is not None
    assert done.stderr is not None
    done.stdout.close()
    done.stdin.close()
    assert done.stderr.read() == b""
    assert done.wait() == 1


def stop(argv: list[str]) -> int:
    raise KeyboardInterrupt


def test_help_needs_no_heavy_import() -> None:
    """Neither torch nor the Hub's client: help is there at once."""
    code = (
        "import sys; from tokenthrift.cli import main; import tokenthrift.budget; main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'lightning', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "multimodal")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# info


def test_info_of_a_folder(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(small)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"system      small ({__name__}.Small)",
        f"from        {small}",
        "parameters  900 in 2 tensors",
        "size        0.0 MB",
        "native      12.5 per second, 4 per frame (tokens before any reduction)",
        "tokens      max_tokens, retention (nested)",
        "decoding    max_new_tokens, max_rounds, confidence_threshold, certify, hotwords",
        "config",
        "  sizes",
        "    width: 8",
        "  name: small",
    ]


def test_a_missing_path_is_wrong_usage_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["info", "./nowhere"],
        ["push", "./nowhere", "owner/name"],
        ["convert", "karl", "./nowhere.pt", str(tmp_path / "out")],
        ["plan", "./nowhere.png", "--model", "./nowhere"],
        ["tokenize", "./nowhere.png", "--model", "./nowhere"],
        ["transcribe", "./nowhere.wav", "--model", "./nowhere"],
    ):
        assert cli.main(command) == 2, command
        captured = capsys.readouterr()
        assert "nowhere" in captured.err
        assert captured.out == ""


def test_a_folder_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights.pt").write_bytes(b"")
    assert cli.main(["convert", "karl", str(tmp_path / "old"), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'old'} is a folder; name the files in it: weights.pt" in capsys.readouterr().err


HELPFUL = [[name] for group in cli.COMMANDS.values() for name in group]
HELPFUL += [["evaluate", system.name] for system in SYSTEMS.values() if system.evaluator]


@pytest.mark.parametrize("command", HELPFUL, ids=" ".join)
def test_the_help_of_a_command_waits_for_nothing_heavy(command: list[str]) -> None:
    code = (
        f"import sys; from tokenthrift.cli import main\ntry: main([*{command}, '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'lightning', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    roots = os.pathsep.join(str(ROOT / root) for root in ("multimodal", "tokenizers", "asr"))
    environment = {**os.environ, "PYTHONPATH": roots}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: tokenthrift {' '.join(command)}")
    if command[0] in ("plan", "tokenize", "info", "push", "transcribe") or len(command) == 2:
        assert "--revision" in done.stdout


def test_a_model_that_exists_only_at_a_revision(hub: HubServer, small: Path) -> None:
    hub.add("org/small", {path.name: path.read_bytes() for path in small.iterdir()}, branch="v2")
    assert type(models.load("org/small", revision="v2")).__name__ == "Small"
    assert models.find("org/small", revision="v2", weights=True).commit
    assert type(models.load(small, dtype="bfloat16")).__name__ == "Small"


def test_info_of_the_baseline_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.asr.tiny_dllm import tiny_config, vocabulary
    from tokenthrift.dllm_asr.autoregressive import AutoregressiveDecoder

    AutoregressiveDecoder(tiny_config("whisper"), vocabulary()).save_pretrained(tmp_path)
    assert cli.main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("system      dllm_asr_autoregressive (")
    assert "\ndecoding " not in shown, "it writes for the benchmark alone"


def test_info_of_a_repository(hub: HubServer, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add("org/small", {path.name: path.read_bytes() for path in small.iterdir()})
    assert cli.main(["info", "org/small"]) == 0
    assert f"from        org/small at {commit}\n" in capsys.readouterr().out
    assert cli.main(["info", "org/small", "--revision", "v2"]) == 2
    assert "tokenthrift info: org/small has no revision 'v2'" in capsys.readouterr().err
    hub.requests.clear()
    assert cli.main(["info", "org/small", "--local-files-only"]) == 0
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "unheard"}, "system is 'unheard'; this release knows dllm_asr"),
        ({"system": None}, "system is None"),
        ({"system": ["small"]}, "system is ['small']"),
        ({"sizes": {"width": 10**9}}, "within 1 and 4096"),
        ({"sizes": {"width": 9}}, "net.weight is [100, 8] in the file and [100, 9] in the model"),
    ],
)
def test_info_says_what_is_wrong(
    small: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**fields, **change}))
    assert cli.main(["info", str(small)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tokenthrift info: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


# push


def test_push_uploads_what_loads(hub: HubServer, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "README.md").write_text("# Small\n")
    assert cli.main(["push", str(small), "tester/small", "--private", "--message", "First"]) == 0
    repository = hub.repositories["tester/small"]
    address = capsys.readouterr().out.strip()
    assert address == f"{hub.endpoint}/tester/small/commit/{repository.branches['main']}"
    assert set(repository.commits[repository.branches["main"]]) == {"README.md", "config.json", "model.safetensors"}
    assert repository.private
    assert cli.main(["info", "tester/small"]) == 0


def test_push_uploads_nothing_that_does_not_load(
    hub: HubServer, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(weights[:-1])
    assert cli.main(["push", str(small), "tester/small"]) == 1
    assert "tokenthrift push: " in capsys.readouterr().err
    assert cli.main(["push", "org/small", "tester/small"]) == 2
    assert "there is no folder 'org/small' to upload" in capsys.readouterr().err
    assert hub.requests == []
    with pytest.raises(SystemExit) as caught:
        cli.main(["push", str(small)])
    assert caught.value.code == 2
