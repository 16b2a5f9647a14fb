"""The weights of Silero VAD: where they are, and a digest of them; needs neither torch nor the package."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

__all__ = ["find_weights", "weights_digest"]


def find_weights() -> Path | None:
    """The file, or None where the package `silero-vad` is not installed or holds no such file."""
    package = find_spec("silero_vad")
    folders = [] if package is None else package.submodule_search_locations or []
    files = (Path(folder, "data", "silero_vad_16k.safetensors") for folder in folders)
    return next((file for file in files if file.is_file()), None)


def weights_digest() -> str | None:
    """What the file holds, as 32 hexadecimal digits; None without it, where speech is found by energy."""
    weights = find_weights()
    return None if weights is None else hashlib.sha256(weights.read_bytes()).hexdigest()[:32]
