"""One model, one folder: ``config.json`` and ``model.safetensors``, on this machine or on the Hugging Face Hub.

Weights in shards (``model.safetensors.index.json`` and the files that it names) are read too.

``HubModel`` gives every system ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``. It calls the Hub's client
itself instead of inheriting its ``PyTorchModelHubMixin``, whose defaults would all have to be turned off: it loads
with ``strict=False``, falls back to ``pytorch_model.bin`` and drops configuration fields it does not know.

Loading goes from cheap to expensive and stops at the first thing that is wrong: configuration (types, then ranges),
then the header of the weights against the model built on the meta device (shapes without memory), then the memory.
Parameters are taken from the file as they are: nothing is initialized at random only to be overwritten.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from tokenthrift.config import ConfigError, from_plain, read_json, to_plain
from tokenthrift.sources import PICKLES, WEIGHTS, SourceError, WeightsError, fetch, fetch_weights, is_folder
from tokenthrift.weights import (
    assign_weights,
    check_header,
    empty_parameters,
    read_headers,
    unique_tensors,
    write_weights,
)

__all__ = ["ConfigError", "HubModel", "SourceError", "WeightsError", "push_folder", "read_config"]

CONFIG: Final = "config.json"
FORMAT_VERSION: Final = 2
MODEL_TYPE_PREFIX: Final = "tokenthrift_"  # transformers finds a class by `model_type`; see `tokenthrift.auto`
# What transformers writes into config.json beside the model's own fields; it says nothing about the model.
OF_TRANSFORMERS: Final = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")


class HubModel(nn.Module):
    """Base of the models that are saved as a folder and shared as a Hub repository.

    A subclass names its ``system`` and its ``config_class``, and takes the configuration first and everything else that
    it needs from files (a tokenizer, say) as keyword arguments: ``cls(config, **cls.read_assets(folder))``. It must be
    possible to build it under ``torch.device("meta")``, so constructors do not read values out of parameters.

    Attributes:
        system: the word in ``config.json`` that says whose model it is.
        config_class: a frozen dataclass of plain data; its ``__post_init__`` checks every range.
        asset_files: further files that belong to the model, relative to its folder.
    """

    system: ClassVar[str]
    config_class: ClassVar[type]
    asset_files: ClassVar[tuple[str, ...]] = ()
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def needed_files(cls, config: Any) -> tuple[str, ...]:
        """Those of ``asset_files`` that a model of this configuration cannot do without."""
        return cls.asset_files

    @classmethod
    def read_assets(cls, folder: Path) -> dict[str, Any]:
        """Reads ``asset_files`` and returns them as keyword arguments of the constructor."""
        return {}

    def write_assets(self, folder: Path) -> None:
        """Writes ``asset_files``."""

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """More files for `save_pretrained`, by which transformers finds a processor; our loading reads none."""
        return {}

    def load_external(self, **options: Any) -> None:
        """Fills parts whose weights lie in other folders or repositories; ``options`` are those of ``fetch``."""

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """The plain data of an older ``format_version`` under today's names; unknown names stay, so that they raise."""
        return fields

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float32,
        device_map: str | Mapping[str, str | int | torch.device] | None = None,
    ) -> Self:
        """Loads a model, in evaluation mode. Neither reads nor changes the global random state.

        Args:
            source: a folder, or ``owner/name`` on the Hub.
            revision: branch, tag or commit on the Hub.
            cache_dir: the Hub client's cache; its own default if not given.
            token: access token for private repositories.
            local_files_only: never use the network.
            device: where the model goes.
            dtype: precision of its floating-point tensors, whatever the file holds; also by name, as "bfloat16".
            device_map: one device for the whole model, as transformers writes it: "cuda:0", {"": 0} or "auto".

        Raises:
            ValueError: no such precision, or a map that spreads the model over several devices.
            SourceError: the source leads nowhere.
            ConfigError: the configuration is not of this system, or not valid.
            WeightsError: a pickle, a damaged file, or tensors other than the model's.
        """
        precision, target = parse_dtype(dtype), parse_device(device, device_map)
        get = partial(fetch, source, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        folder = get((CONFIG,), revision=revision)
        config = read_config(folder, cls)
        commit = None if is_folder(source) else folder.name
        files = fetch_weights(
            source, revision=commit, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
        if needed := cls.needed_files(config):
            get(needed, revision=commit)
        assets = cls.read_assets(folder)
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                expected = unique_tensors(cls(config, **assets))
            check_header(read_headers(files), expected, folder / WEIGHTS)
            with empty_parameters():
                model = cls(config, **assets)
        assign_weights(model, folder / WEIGHTS, target, precision, files)
        model.load_external(cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        return model.to(device=target, dtype=precision).eval()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes the model's files; other files in the folder stay. Each file appears complete or not at all.

        Args:
            folder: created if it does not exist.
            dtype: precision of the floating-point tensors in the file (``torch.float16`` halves it); as in memory if
                not given.

        Raises:
            WeightsError: a number is too large for that precision. Nothing is written then.
        """
        folder = Path(folder).resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "system": self.system,
            "format_version": FORMAT_VERSION,
            "model_type": MODEL_TYPE_PREFIX + self.system,
            "dtype": "float32",  # to compute in, whatever the file holds
        }
        files = {**self.processor_files(), CONFIG: {**head, **to_plain(self.config)}}

        def write(draft: Path) -> None:
            write_weights(self, draft / WEIGHTS, dtype)
            self.write_assets(draft)
            for name, fields in files.items():
                (draft / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

        _replace_files(folder, write)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        dtype: torch.dtype | None = None,
    ) -> str:
        """Saves the model and uploads it, creating the repository if needed.

        Args:
            repo_id: ``owner/name``.
            private: whether a new repository is private.
            token: access token that may write; the one the user logged in with if not given.
            revision: branch to commit to, created if needed; the main branch if not given.
            commit_message: what the commit says.
            dtype: precision of the file, as in ``save_pretrained``.

        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype=dtype)
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )


def read_config(folder: Path, model_class: type[HubModel]) -> Any:
    """Reads a folder's configuration as ``model_class.config_class``.

    Raises:
        ConfigError: it belongs to another system, a newer format, or is not valid.
    """
    path = folder / CONFIG
    fields = read_json(path)
    system, version = fields.pop("system", None), fields.pop("format_version", None)
    for name in OF_TRANSFORMERS:
        fields.pop(name, None)
    if system != model_class.system:
        raise ConfigError(f"{path}: system is {system!r}, but {model_class.__name__} reads {model_class.system!r}")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ConfigError(f"{path}: format_version is {version!r}, but this release reads 1 to {FORMAT_VERSION}")
    if version < FORMAT_VERSION:
        fields = model_class.upgrade_config(fields, version)
    return from_plain(model_class.config_class, fields, str(path))


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> str:
    """Uploads a model's folder as it is, model card included; hidden files stay here.

    Returns:
        The address of the commit.

    Raises:
        SourceError: the folder is not a model's, or the Hub refuses.
        WeightsError: a pickled checkpoint lies in the folder; the Hub would offer it to everybody.
    """
    if not is_folder(folder):
        raise SourceError(f"there is no folder {str(folder)!r} to upload")
    fetch_weights(folder)
    folder = fetch(folder, (CONFIG,))
    pickles = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise WeightsError(f"{folder} holds pickled checkpoints, which are never uploaded: {', '.join(pickles)}")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            ignore_patterns=[".*", "*/.*"],
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise SourceError(f"cannot upload to {repo_id}: {error}") from error
    return str(commit.commit_url)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A precision of floating-point numbers, by name or as it is.

    Raises:
        ValueError: there is none of that name.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r}; a model's numbers are float32, bfloat16, float16 or float64")
    return found


def parse_device(
    device: str | torch.device, device_map: str | Mapping[str, str | int | torch.device] | None
) -> torch.device:
    """The device of the whole model.

    Raises:
        ValueError: there is no device of that name, or the map spreads the model over several.
    """
    target: Any = device if device_map is None else device_map
    if isinstance(target, Mapping) and len(target) == 1:
        target = target.get("")
    if isinstance(target, str) and target == "auto":
        target = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(target)
    except (RuntimeError, TypeError):
        given = f"device={device!r}" if device_map is None else f"device_map={device_map!r}"
        raise ValueError(
            f"{given}: these models lie on one device as a whole; give device='cuda', or a device_map that names one "
            "device, or 'auto'"
        ) from None


def _replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a hidden folder next to the wanted one, then moves the files into place.

    A new folder appears at once; in an existing one file after file is replaced, the configuration last.
    """
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        write(draft)
        if not folder.exists():
            draft.rename(folder)
            return
        for path in sorted(draft.rglob("*"), key=lambda path: path == draft / CONFIG):
            target = folder / path.relative_to(draft)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
