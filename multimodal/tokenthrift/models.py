"""Whatever model a folder or a Hub repository holds: loaded, built without memory, or described.

Every way of reading one is by the same strict rules (see `tokenthrift.hub`); the class comes from this release's own
table, never from the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import CacheNotFound, scan_cache_dir

from tokenthrift.budget import BudgetSupport, DecodeBudget, NativeCost
from tokenthrift.config import ConfigError, read_json, to_plain
from tokenthrift.hub import CONFIG, HubModel, read_config
from tokenthrift.registry import resolve, those_with
from tokenthrift.sources import INDEX, WEIGHTS, fetch, fetch_weights, is_folder
from tokenthrift.weights import check_header, read_headers, unique_tensors

__all__ = ["Found", "describe", "find", "list_models", "load", "model_class"]

CHECKOUT: Final = Path(__file__).resolve().parents[2]  # of a checkout; in a wheel there is no `model_cards` there


def load(source: str | Path, *, revision: str | None = None, **options: Any) -> HubModel:
    """Loads the model of a folder or of a repository on the Hub, of whichever system it is.

    Args:
        source: a folder, or `owner/name`.
        revision: branch, tag or commit on the Hub.
        options: what `HubModel.from_pretrained` takes besides: device, dtype, cache_dir, token, local_files_only.

    Raises:
        SourceError, ConfigError, WeightsError: as `HubModel.from_pretrained`.
    """
    hub = {name: options[name] for name in ("cache_dir", "token", "local_files_only") if name in options}
    kind = model_class(fetch(source, (CONFIG,), revision=revision, **hub))
    return kind.from_pretrained(source, revision=revision, **options)


def list_models(*folders: str | Path, system: str | None = None, cache_dir: str | Path | None = None) -> list[str]:
    """The models on this machine, each as `load` takes it.

    Args:
        folders: where model folders lie; `model_cards` in the current folder and beside a checkout's sources if none is
            given.
        system: only those of a system, by its name in `registry.SYSTEMS`.
        cache_dir: the Hub client's cache, whose repositories count too; its own default if not given.

    Returns:
        Paths of folders, and `owner/name` of repositories in the cache, each sorted.
    """
    places = [Path(folder) for folder in folders] or [Path("model_cards"), CHECKOUT / "model_cards"]
    found: dict[Path, str] = {}
    for place in places:
        for config in sorted(place.glob(f"*/{CONFIG}")):
            found.setdefault(config.parent.resolve(), str(config.parent))
    names = [name for folder, name in found.items() if _is_complete(folder, system)]
    return names + sorted(_cached(system, cache_dir))


def _cached(system: str | None, cache_dir: str | Path | None) -> Iterator[str]:
    try:
        cache = scan_cache_dir(cache_dir)
    except CacheNotFound:
        return
    for repository in cache.repos:
        if any(_is_complete(revision.snapshot_path, system) for revision in repository.revisions):
            yield repository.repo_id


def _is_complete(folder: Path, system: str | None) -> bool:
    """Whether a folder holds a model of this release, weights included."""
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    try:
        own = read_json(folder / CONFIG).get("system")
    except ConfigError:
        return False
    return own in those_with("model") and system in (None, own)


def model_class(folder: Path) -> type[HubModel]:
    """The class that a folder's configuration asks for, out of this release's own list.

    Raises:
        ConfigError: the configuration names no system of this release.
    """
    known = those_with("model")
    system = read_json(folder / CONFIG).get("system")
    if not isinstance(system, str) or system not in known:
        raise ConfigError(f"{folder / CONFIG}: system is {system!r}; this release knows {', '.join(known)}")
    found: type[HubModel] = resolve(known[system])
    return found


@dataclass(frozen=True, slots=True)
class Found:
    """A model without its weights.

    Attributes:
        source: as it was named.
        folder: where its files are on this machine.
        commit: of a repository on the Hub.
        model: on the meta device; its configuration can be asked, its budgets planned, and nothing run.
        files: of the weights, if they were fetched.
    """

    source: str
    folder: Path
    commit: str | None
    model: HubModel
    files: tuple[Path, ...] = ()


def find(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False, weights: bool = False
) -> Found:
    """Builds a model without memory.

    Args:
        source: a folder, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        local_files_only: never use the network.
        weights: fetch the weights too, and compare their header with the model.

    Raises:
        SourceError, ConfigError, WeightsError: as `HubModel.from_pretrained`.
    """
    folder = fetch(source, (CONFIG,), revision=revision, local_files_only=local_files_only)
    kind = model_class(folder)
    config = read_config(folder, kind)
    commit = None if is_folder(source) else folder.name
    if kind.asset_files:
        fetch(source, kind.asset_files, revision=commit, local_files_only=local_files_only)
    with torch.device("meta"):
        model = kind(config, **kind.read_assets(folder))
    files = fetch_weights(source, revision=commit, local_files_only=local_files_only) if weights else []
    if weights:
        check_header(read_headers(files), unique_tensors(model), folder / WEIGHTS)
    return Found(str(source), folder, commit, model, tuple(files))


def describe(source: str | Path, revision: str | None = None, local_files_only: bool = False) -> str:
    """A model's system, size, budgets and configuration, as `tokenthrift info` prints them.

    Raises:
        SourceError, ConfigError, WeightsError: as `HubModel.from_pretrained`.
    """
    found = find(source, revision=revision, local_files_only=local_files_only, weights=True)
    kind = type(found.model)
    count = sum(parameter.numel() for parameter in found.model.parameters())
    lines = [
        f"system      {kind.system} ({kind.__module__}.{kind.__qualname__})",
        f"from        {source}" + (f" at {found.commit}" if found.commit else ""),
        f"parameters  {count:,} in {len(read_headers(found.files))} tensors",
        f"size        {sum(file.stat().st_size for file in found.files) / 1e6:.1f} MB",
    ]
    return "\n".join([*lines, *_budgets(found.model), "config", *_tree(to_plain(found.model.config))])


def _budgets(model: HubModel) -> list[str]:
    """What a model costs by unit of its input, and the budget fields that it honors."""
    lines = []
    cost = getattr(model, "native_cost", None)
    if isinstance(cost, NativeCost):
        units = [(f.name.replace("_", " "), getattr(cost, f.name)) for f in fields(cost)]
        rates = ", ".join(f"{value:g} {unit}" for unit, value in units if value is not None)
        lines.append(
            "native      " + (f"{rates} (tokens before any reduction)" if rates else "as its input has tokens")
        )
    support = getattr(model, "support", None)
    if isinstance(support, BudgetSupport):
        words = [name.replace("_", " ") for name in ("nested", "adaptive", "training_free") if getattr(support, name)]
        if support.max_tokens is not None:
            words.append(f"at most {support.max_tokens} tokens")
        if support.choices is not None:
            words.append(f"one of {', '.join(map(str, support.choices))} tokens")
        if support.rates is not None:
            words.append(f"one of {', '.join(f'{rate:g}' for rate in support.rates)} tokens a second")
        honored = ", ".join(sorted(support.fields)) or "no ceilings, the rate is fixed"
        lines.append("tokens      " + honored + (f" ({'; '.join(words)})" if words else ""))
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
