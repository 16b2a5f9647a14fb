"""Where a model comes from: a folder, or a repository on the Hugging Face Hub.

Only named files are ever fetched, with the Hub's own client, so its cache, its offline mode and its tokens work as
people know them. A folder that exists wins over a repository of the same name. Nothing falls back to another file: the
usual loaders quietly take ``pytorch_model.bin`` where the safetensors are missing, and a pickle runs code when opened.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tokenthrift.config import read_json

WEIGHTS: Final = "model.safetensors"
INDEX: Final = f"{WEIGHTS}.index.json"
PICKLES: Final = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


class SourceError(OSError):
    """The name of a model leads nowhere: no such folder, repository, revision or file."""


class WeightsError(ValueError):
    """Weights that are not what the model needs: a pickle, a damaged file, or other tensors than expected."""


def is_folder(source: str | Path) -> bool:
    """Whether the name means a folder on this machine rather than a repository on the Hub."""
    return Path(source).expanduser().is_dir()


def fetch(
    source: str | Path,
    names: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Makes sure that the named files of a model are on this machine.

    Args:
        source: a folder, or ``owner/name`` on the Hub.
        names: files needed, relative to the model's folder; at least one.
        revision: branch, tag or commit; only for the Hub.
        cache_dir: the Hub client's cache; its own default if not given.
        token: access token for private repositories; the one the user logged in with if not given.
        local_files_only: ask nobody, take what the cache has.

    Returns:
        The folder that holds all of them. For the Hub it is named after the commit.

    Raises:
        SourceError: there is no such folder, repository, revision or file, or it cannot be reached and is not cached.
        WeightsError: a pickled checkpoint is given, or is the only thing found.
    """
    if Path(source).suffix in PICKLES and not is_folder(source):
        raise _pickle_error(str(source))
    if is_folder(source):
        if revision is not None:
            raise SourceError(f"{source} is a folder on this machine; a revision ({revision}) needs a Hub repository")
        folder = Path(source).expanduser()
        for name in names:
            if not (folder / name).is_file():
                raise _missing_error(str(source), name, (path.name for path in folder.iterdir()))
        return folder
    repository = _check_repository_name(source)
    options = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
    return _fetch_from_hub(repository, names, revision, options)


def fetch_weights(source: str | Path, prefix: str | tuple[str, ...] = "", **options: Any) -> list[Path]:
    """Makes sure that the tensors of a checkpoint in transformers' format, whole or in shards, are on this machine.

    Args:
        source: as for `fetch`.
        prefix: begins the names of the tensors that are needed; shards without any of them are left out.
        options: of `fetch`.

    Returns:
        `model.safetensors`, or the shards that `model.safetensors.index.json` names, all of one commit.

    Raises:
        SourceError, WeightsError: as `fetch`.
    """
    try:
        return [fetch(source, (WEIGHTS,), **options) / WEIGHTS]
    except SourceError as missing:
        try:
            folder = fetch(source, (INDEX,), **options)
        except SourceError:
            raise missing from None
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsError(f"{folder / INDEX} does not say in which file each tensor is")
    names = sorted({shard for name, shard in shards.items() if name.startswith(prefix)})
    if not names or any(Path(name).name != name or "\\" in name or not name.endswith(".safetensors") for name in names):
        raise WeightsError(f"{folder / INDEX} names something other than safetensors files beside it")
    if not is_folder(source):
        options["revision"] = folder.name
    return [fetch(source, names, **options) / name for name in names]


def beside(folder: Path | None, name: str) -> str:
    """Where a name in a model's files leads, which may be relative to the model: "../other".

    Args:
        folder: of the model, which need not exist yet; None for a model without one.
        name: a folder, absolute or relative to the model's, or `owner/name`.

    Returns:
        The folder beside the model's; for a model in the cache of the Hub's client, the repository of the same owner;
        otherwise the name as it is.
    """
    if folder is None:
        return name
    found = os.path.normpath(folder / name)
    if is_folder(found):
        return found
    sibling = re.fullmatch(r"\.\./([\w.-]+)", name)
    snapshot = re.fullmatch(r"models--([\w.-]+?)--[\w.-]+", folder.parent.parent.name)
    if sibling and snapshot and folder.parent.name == "snapshots":
        return f"{snapshot[1]}/{sibling[1]}"
    return name


def _fetch_from_hub(repository: str, names: Sequence[str], revision: str | None, options: dict[str, Any]) -> Path:
    # The client takes half a second to import, which a folder on this machine need not wait for.
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = Path()
    for name in names:
        try:
            path = hf_hub_download(repository, name, revision=revision, **options)
        except HFValidationError as error:
            raise SourceError(f"there is no folder {repository!r}, nor can it be a Hub repository: {error}") from error
        except RemoteEntryNotFoundError as error:
            present = HfApi(token=options["token"]).list_repo_files(repository, revision=revision)
            raise _missing_error(repository, name, present) from error
        except LocalEntryNotFoundError as error:
            reason = "the network was not asked" if options["local_files_only"] else "the Hub could not be reached"
            raise SourceError(f"{repository}: {name} is not in the cache and {reason}") from error
        except RevisionNotFoundError as error:
            raise SourceError(f"{repository} has no revision {revision!r}") from error
        except RepositoryNotFoundError as error:
            raise SourceError(
                f"there is no folder {repository!r} here and no such repository on the Hub "
                "(if it is private or gated, log in with `hf auth login` or pass a token)"
            ) from error
        except HfHubHTTPError as error:
            raise SourceError(f"{repository}: the Hub did not give {name}: {error}") from error
        folder = Path(path).parents[len(Path(name).parts) - 1]
        # The branch may move between two downloads; the commit of the first file holds for all of them.
        revision = folder.name
    return folder


def _check_repository_name(source: str | Path) -> str:
    name = str(source)
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith(("/", ".", "~")) or "\\" in name:
        if Path(name).expanduser().exists():
            raise SourceError(f"{name} is not a folder; give the folder that holds config.json and model.safetensors")
        raise SourceError(f"there is no folder {name!r}; a repository on the Hub is named owner/name")
    return name


def _missing_error(source: str, name: str, present: Iterable[str]) -> SourceError | WeightsError:
    files = sorted(present)
    pickles = [file for file in files if Path(file).suffix in PICKLES]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        return _pickle_error(f"{source}/{pickles[0]}", f"{source} has no {name}. ")
    return SourceError(f"{source} has no {name}: it is not a model of Tokenthrift, or not a complete one")


def _pickle_error(path: str, before: str = "") -> WeightsError:
    return WeightsError(
        f"{before}{path} is a pickled checkpoint, and opening one can run code, so it is not loaded; "
        "turn it into safetensors once with `tokenthrift convert`"
    )
