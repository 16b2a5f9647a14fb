"""What identifies a piece of work: the input, the model and the options; a key of these is in the journal."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

__all__ = ["file_identity", "key_of", "model_digest", "model_identity"]

_FORMAT: Final = 1
_SAMPLE: Final = 1 << 16
_SAMPLES: Final = 64


def key_of(identity: dict[str, Any], model: str, options: dict[str, Any]) -> str:
    """The key of a piece of work: the same input, model and options give the same result."""
    text = json.dumps([_FORMAT, identity, model, options], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_identity(path: Path) -> dict[str, int]:
    """Size and time of change of a file; -1 where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return {"size": -1, "changed": -1}
    return {"size": found.st_size, "changed": found.st_mtime_ns}


def model_identity(source: str, revision: str | None) -> str:
    """What identifies a model: the commit of a repository, the content of a folder.

    Raises:
        SourceError: the source leads nowhere.
    """
    from tokenthrift.sources import fetch, is_folder

    folder: Path = fetch(source, ("config.json",), revision=revision)
    return model_digest(folder) if is_folder(source) else f"{source}@{folder.name}"


def model_digest(folder: Path) -> str:
    """A digest of the content of a model folder: of large files, their size and 64 pieces."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        if path.suffix == ".md":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            if size <= _SAMPLE * _SAMPLES:
                digest.update(file.read())
            else:
                for i in range(_SAMPLES):
                    file.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:32]
