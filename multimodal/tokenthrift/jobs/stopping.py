"""Ending a job in peace: after the batch in hand, with everything that is done on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stop"]


class Stop:
    """Whether the job is to end after the batch in hand: asked by a signal, or by a failure that ends it.

    A second signal ends the process at once, which the journal survives.
    """

    def __init__(self) -> None:
        self.asked = False
        self.signaled = False

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask; not outside of the main thread, which alone may say so."""
        import signal
        import threading

        def ask(number: int, frame: Any) -> None:
            if self.signaled:
                raise KeyboardInterrupt
            self.asked = self.signaled = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
