"""`tokenthrift info`, `push` and `convert`: look at a model, share it, and make one of checkpoints.

Both load by the same strict rules as everything else. `info` builds the model without memory (on the meta device) and
reads only the header of its weights; `push` loads the folder in full first, so that nothing broken is ever uploaded.
"""

import argparse
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from tokenthrift.budget import BudgetSupport, DecodeBudget
from tokenthrift.cli import CONVERTERS, SYSTEMS, load
from tokenthrift.config import ConfigError, read_json, to_plain
from tokenthrift.extras import MissingExtraError
from tokenthrift.hub import CONFIG, WEIGHTS, HubModel, push_folder, read_config
from tokenthrift.sources import SourceError, fetch, is_folder
from tokenthrift.weights import check_header, read_header, unique_tensors


def info(argv: Sequence[str]) -> int:
    """Prints a model's system, size, budget support and configuration."""
    parser = argparse.ArgumentParser(
        prog="tokenthrift info", description="Show what a model is, how large, and which budgets it honours."
    )
    _add_model(parser)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    arguments = parser.parse_args(argv)
    try:
        print(describe(arguments.model, arguments.revision, arguments.local_files_only))
    except (MissingExtraError, OSError, ValueError) as error:
        return _fail("info", error)
    return 0


def push(argv: Sequence[str]) -> int:
    """Checks a folder and uploads it."""
    parser = argparse.ArgumentParser(
        prog="tokenthrift push",
        description="Upload a model's folder, card (README.md) included, after checking that it loads. "
        "Log in once with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("model", metavar="MODEL", help="the folder with config.json and model.safetensors")
    parser.add_argument("repository", metavar="REPOSITORY", help="owner/name on the Hub; created if needed")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--revision", help="branch to upload to, created if needed (default: main)")
    parser.add_argument("--message", default="Upload model", help="what the commit says (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if not is_folder(arguments.model):
            raise SourceError(f"there is no folder {arguments.model!r} to upload")
        model_class(fetch(arguments.model, (CONFIG,))).from_pretrained(arguments.model)
        address = push_folder(
            arguments.model,
            arguments.repository,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    except (MissingExtraError, OSError, ValueError) as error:
        return _fail("push", error)
    print(address)
    return 0


def convert(argv: Sequence[str]) -> int:
    """Makes a model's folder of checkpoint files."""
    parser = argparse.ArgumentParser(
        prog="tokenthrift convert",
        description="Make a model's folder (fp16 safetensors) of checkpoints, which are read without running code.",
    )
    known = sorted(CONVERTERS)
    parser.add_argument("system", choices=known, metavar="SYSTEM", help=" or ".join(known))
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="FILE", help="checkpoint; several give their parts"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        make: Callable[[Sequence[Path]], HubModel] = load(CONVERTERS[arguments.system])
        make(arguments.checkpoints).save_pretrained(arguments.out, dtype=torch.float16)
    except (MissingExtraError, OSError, ValueError, pickle.UnpicklingError) as error:
        return _fail("convert", error)
    print(f"{arguments.out}: {sum(f.stat().st_size for f in arguments.out.iterdir()) / 1e6:.1f} MB")
    return 0


def model_class(folder: Path) -> type[HubModel]:
    """The class that a folder's configuration asks for, out of this release's own list.

    Raises:
        ConfigError: the configuration names no system of this release.
    """
    system = read_json(folder / CONFIG).get("system")
    if not isinstance(system, str) or system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise ConfigError(f"{folder / CONFIG}: system is {system!r}; this release knows {known}")
    found: type[HubModel] = load(SYSTEMS[system])
    return found


def describe(source: str, revision: str | None = None, local_files_only: bool = False) -> str:
    """What `tokenthrift info` prints.

    Raises:
        SourceError, ConfigError, WeightsError: as when loading the model.
    """
    folder = fetch(source, (CONFIG,), revision=revision, local_files_only=local_files_only)
    kind = model_class(folder)
    config = read_config(folder, kind)
    commit = None if is_folder(source) else folder.name
    fetch(source, (WEIGHTS, *kind.asset_files), revision=commit, local_files_only=local_files_only)
    with torch.device("meta"):
        model = kind(config, **kind.read_assets(folder))
    header = read_header(folder / WEIGHTS)
    check_header(header, unique_tensors(model), folder / WEIGHTS)
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"system      {kind.system} ({kind.__module__}.{kind.__qualname__})",
        f"from        {source}" + (f" at {commit}" if commit else ""),
        f"parameters  {count:,} in {len(header)} tensors",
        f"size        {(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB",
    ]
    return "\n".join([*lines, *_budgets(model), "config", *_tree(to_plain(config))])


def _budgets(model: HubModel) -> list[str]:
    """The budget fields that a model honours: of tokens where it has a `support`, of decoding where it transcribes."""
    lines = []
    support = getattr(model, "support", None)
    if isinstance(support, BudgetSupport):
        words = [name for name in ("nested", "adaptive", "training_free") if getattr(support, name)]
        if support.max_tokens is not None:
            words.append(f"at most {support.max_tokens} tokens")
        if support.choices is not None:
            words.append(f"one of {', '.join(map(str, support.choices))} tokens")
        honoured = ", ".join(sorted(support.fields)) or "no ceilings, the rate is fixed"
        lines.append("tokens      " + honoured + (f" ({'; '.join(words)})" if words else ""))
    if hasattr(model, "transcribe"):
        lines.append("decoding    " + ", ".join(field.name for field in fields(DecodeBudget)))
    return lines


def _tree(config: dict[str, object], indent: str = "  ") -> list[str]:
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_tree(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or owner/name on the Hugging Face Hub")


def _fail(command: str, error: Exception) -> int:
    print(f"tokenthrift {command}: {error}", file=sys.stderr)
    return 1
