"""What a reader raises about a file: the path, and a reason fit for a report."""

from __future__ import annotations

import stat
from pathlib import Path

__all__ = ["MediaError", "cause", "check_file"]


class MediaError(ValueError):
    """A file that gives no whole recording, video or picture.

    Attributes:
        path: The file.
        reason: Why, without the path.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def check_file(path: Path, error: type[MediaError]) -> None:
    """Refuses what may never begin or never end: a pipe, a socket, a device.

    Raises:
        MediaError: of the type given: it is one. What cannot be looked at is for the reader to name.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise error(path, "cannot be read: a pipe, a socket or a device, and no file")


def cause(error: Exception) -> str:
    """FFmpeg's words without the error number and the path, which the report states anyway."""
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
