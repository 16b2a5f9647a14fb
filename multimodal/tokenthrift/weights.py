"""The tensors of a module as one safetensors file: written once each, read back strictly.

Reading compares the file's header with the module's own names and shapes before a byte of data is touched. A missing,
an extra and a mis-shaped tensor are all errors: loaders that only warn have shipped models with random layers.
Tensors tied inside the module (one Parameter under two names) are stored under their first name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenthrift.sources import WeightsError

Header = dict[str, tuple[tuple[int, ...], bool]]  # name: (shape, whether it holds floating-point numbers)

NAMES_SHOWN: Final = 10


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once."""
    seen: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise WeightsError(f"{name} is not a tensor; only tensors can be stored as safetensors")
        if seen.setdefault(id(tensor), name) == name:
            tensors[name] = tensor
    return tensors


def read_header(path: Path) -> Header:
    """Names, shapes and kinds of the tensors in a file, without reading them.

    Raises:
        WeightsError: it is not a safetensors file, or a damaged one.
    """
    header: Header = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file is not a mapping)
                view = file.get_slice(name)
                header[name] = (tuple(view.get_shape()), view.get_dtype().startswith(("F", "BF")))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file, or a damaged one: {error}") from error
    return header


def check_header(header: Header, expected: Mapping[str, Tensor], path: Path) -> None:
    """Compares a file's header with the tensors that a module has (they may be on the meta device).

    Raises:
        WeightsError: naming up to ten of the missing, unknown, mis-shaped or wrongly typed tensors.
    """
    problems = [f"{name} is missing" for name in expected if name not in header]
    problems += [f"{name} is unknown to the model" for name in header if name not in expected]
    for name, tensor in expected.items():
        if name not in header:
            continue
        shape, is_float = header[name]
        if shape != tuple(tensor.shape):
            problems.append(f"{name} is {list(shape)} in the file and {list(tensor.shape)} in the model")
        elif is_float != tensor.is_floating_point():
            problems.append(f"{name} holds {'floats' if is_float else 'integers'}, the model expects {tensor.dtype}")
    if problems:
        shown = "; ".join(problems[:NAMES_SHOWN])
        rest = f"; and {len(problems) - NAMES_SHOWN} more" if len(problems) > NAMES_SHOWN else ""
        raise WeightsError(f"{path} does not fit the model: {shown}{rest}")


def read_weights(module: nn.Module, path: Path) -> None:
    """Fills a module from a file, one tensor at a time; the module keeps its own precision and device.

    Raises:
        WeightsError: see :func:`read_header` and :func:`check_header`.
    """
    tensors = unique_tensors(module)
    check_header(read_header(path), tensors, path)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def write_weights(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a module's tensors.

    Args:
        module: on any device.
        path: the file to create or replace.
        dtype: precision of the floating-point tensors in the file; as they are if not given.

    Raises:
        WeightsError: a number is too large for that precision, or that is no precision.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise WeightsError(f"{dtype} cannot hold a model's numbers; use torch.float16, bfloat16, float32 or float64")
    stored = {}
    for name, tensor in unique_tensors(module).items():
        value = tensor.detach().cpu()
        if dtype is not None and value.is_floating_point():
            narrowed = value.to(dtype)
            if not torch.equal(narrowed.isfinite(), value.isfinite()):
                raise WeightsError(f"{name} holds numbers too large for {dtype}; save it in another precision")
            value = narrowed
        stored[name] = value.contiguous()
    save_file(stored, path, metadata={"format": "pt"})
