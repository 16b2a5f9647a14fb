"""Kill -9 at a chosen durable write of a child process, for tests of jobs that survive it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tree(folder: Path) -> dict[str, bytes]:
    """Everything, the journal included; only the lock has no content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def forked(work: Callable[[], int]) -> int:
    """Runs in a child and gives its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(event: int, torn: int) -> None:
    """From now on, this process dies by kill -9 at its so-many-th durable write; `torn` bytes of that are lost."""
    count = 0
    real: dict[str, Callable[..., Any]] = {"fsync": os.fsync, "replace": os.replace}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == event:
                if name == "fsync":
                    os.ftruncate(arguments[0], max(0, os.fstat(arguments[0]).st_size - torn))
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments)

        return call

    os.fsync, os.replace = wrap("fsync"), wrap("replace")
