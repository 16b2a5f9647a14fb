"""`tokenthrift convert`: makes a model's folder of checkpoint files, which are read without running code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenthrift.commands.arguments import DONE, fail, make_parser
from tokenthrift.registry import SYSTEMS, resolve, those_with

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    converters = those_with("converter")
    known = sorted(converters)
    parser = make_parser(
        "convert",
        "Make a model's folder (fp16 safetensors) of checkpoints, which are read without running code.",
    )
    parser.add_argument("system", choices=known, metavar="SYSTEM", help=" or ".join(known))
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="FILE", help="checkpoint; several give their parts"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    arguments = parser.parse_args(argv)
    try:
        for path in arguments.checkpoints:
            _check_file(path, folders=SYSTEMS[arguments.system].converts_folders)
        import torch

        convert: Callable[[Sequence[Path]], Any] = resolve(converters[arguments.system])
        convert(arguments.checkpoints).save_pretrained(arguments.out, dtype=torch.float16)
    except (ImportError, OSError, ValueError, pickle.UnpicklingError) as error:
        return fail("convert", error)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")
    return DONE


def _check_file(path: Path, *, folders: bool) -> None:
    """Raises what a person can act on where a file is a folder, or is not there."""
    if path.is_dir() and not folders:
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        inside = f"name the files in it: {', '.join(files[:8])}" if files else "and it holds no files"
        raise IsADirectoryError(f"{path} is a folder; {inside}")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
