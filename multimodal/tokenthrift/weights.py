"""The tensors of a module as one safetensors file: written once each, read back strictly.

Reading compares the file's header with the module's own names and shapes before a byte of data is touched. A missing,
an extra and a mis-shaped tensor are all errors: loaders that only warn have shipped models with random layers. A module
that is built to be filled has its parameters on the meta device, without memory, and its buffers as they are computed;
those that no file holds (positions, rotary frequencies) are then exact without a rule of their own.
Tensors tied inside the module (one Parameter under two names) are stored under their first name.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

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


def read_headers(paths: Sequence[Path]) -> Header:
    """The headers of several files as one; see `read_header`.

    Raises:
        WeightsError: also where two files hold a tensor of one name.
    """
    header: Header = {}
    for path in paths:
        own = read_header(path)
        if twice := sorted(header.keys() & own.keys()):
            raise WeightsError(f"{path} holds {twice[0]}, which another file holds too")
        header.update(own)
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


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters that this thread makes in here lie on the meta device: they have shapes, no memory and no values."""
    owner = threading.get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def assign_weights(
    module: nn.Module, path: Path, device: torch.device, dtype: torch.dtype, shards: Sequence[Path] = ()
) -> None:
    """Puts a file's tensors in place of a module's, tensor by tensor; tied ones stay tied.

    Args:
        module: built in `empty_parameters`.
        path: the file, or the index of several.
        shards: the files of an index.
        device: where the tensors go.
        dtype: precision of the floating-point ones.

    Raises:
        WeightsError: see :func:`read_header` and :func:`check_header`.
    """
    expected = unique_tensors(module)
    headers = {file: read_header(file) for file in shards or (path,)}
    check_header({name: shape for header in headers.values() for name, shape in header.items()}, expected, path)
    homes = {name: file for file, header in headers.items() for name in header}
    filled: dict[int, Tensor] = {}
    try:
        for name, tensor in expected.items():
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            # Opened for each tensor, since what was read stays mapped in memory until the file is closed; and a copy,
            # since a mapped tensor would change, or fail, with the file.
            with safe_open(homes[name], framework="pt") as file:
                value = file.get_tensor(name).to(device=device, dtype=kind, copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            filled[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, own in table.items():
                if own is not None and id(own) in filled:
                    table[name] = filled[id(own)]  # type: ignore[assignment]


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
