"""What a reader raises about a file: the path, and a reason fit for a report."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MediaError", "cause"]


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


def cause(error: Exception) -> str:
    """FFmpeg's words without the error number and the path, which the report states anyway."""
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__)
