"""Checkpoints of strangers: their tensors, and nothing that runs.

Published checkpoints are pickles, and many hold more than tensors: the `argparse.Namespace` of their training, an
OmegaConf tree, a task object. `torch.load` with `weights_only=True` refuses those, and plain unpickling would import
and run whatever the file names. Here torch's own restricted unpickler reads the file, and the classes that a converter
lists are replaced by inert stubs: they take any arguments and do nothing. A file that names anything else is refused
before it is read, with the names. So is an object that is a dictionary of a class of its own, by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from tokenthrift.sources import WeightsError

__all__ = ["read_checkpoint", "tensors_in"]


class Inert(list[object]):
    """Stands for an object of a class that is not imported; a list, because torch adds items to lists only."""

    def __init__(self, *arguments: object, **options: object) -> None:
        """Ignores what the object would have been made of."""

    def __setstate__(self, state: object) -> None:
        """Ignores its attributes."""

    def append(self, item: object) -> None:
        """Ignores an item of it."""

    def extend(self, items: object) -> None:
        """Ignores its items."""


def read_checkpoint(path: Path, inert: Sequence[str] = ()) -> Any:
    """Reads a file of `torch.save` without importing or running what it names.

    Args:
        path: the checkpoint. Its tensors stay on disk until they are used.
        inert: full names of classes that become stubs; one that ends in a dot stands for everything below it.

    Raises:
        OSError: the file cannot be read.
        WeightsError: it is no such file or a damaged one, or names something that is neither a tensor nor listed.
    """
    try:
        unknown = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, UnpicklingError, EOFError) as error:
        raise WeightsError(f"{path} is no checkpoint that can be read safely: {error}") from error
    refused = sorted(n for n in unknown if not any(n == i or (i.endswith(".") and n.startswith(i)) for i in inert))
    if refused:
        raise WeightsError(
            f"{path} asks for {', '.join(refused)}, which a checkpoint of this kind does not need; it was not opened"
        )
    stubs: list[tuple[Any, str]] = [(type("Inert", (Inert,), {}), name) for name in unknown]
    try:
        with safe_globals(stubs):  # type: ignore[arg-type]  # its annotation forgets (class, name)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (ValueError, RuntimeError, UnpicklingError, EOFError, AttributeError, TypeError, KeyError) as error:
        # torch's message begins with the advice to unpickle everything.
        reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].strip()
        raise WeightsError(f"{path} cannot be read safely: {reason or error}") from error


def tensors_in(found: object, path: Path) -> dict[str, Tensor]:
    """The named tensors of a state dict that `read_checkpoint` found.

    Raises:
        WeightsError: it is no state dict.
    """
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise WeightsError(f"{path} holds no state dict where one belongs")
    return dict(found)
