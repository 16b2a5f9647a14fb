"""Optional dependencies, imported at first use: ``torchaudio = extras.require("torchaudio")`` inside a function.

Modules that are themselves optional, as Lightning's are, import theirs at the top; `registry.resolve` asks `missing`
what to say where that fails.

An installed package can still fail to load (torchvision and torchaudio raise ``RuntimeError`` or ``OSError`` when they
were built for another torch), so every such failure gets the same answer: the extra to install, and the cause.
"""

import importlib
from types import ModuleType
from typing import Final

# Import name of every optional dependency and the extra in pyproject.toml that brings it.
EXTRAS: Final = {
    "av": "audio",
    "cv2": "lips",
    "decord": "video",
    "jiwer": "evaluation",
    "jsonargparse": "train",
    "lightning": "train",
    "matplotlib": "evaluation",
    "peft": "lora",
    "PIL": "video",
    "rapidfuzz": "train",
    "scipy": "evaluation",
    "timm": "vision",
    "torchaudio": "audio",
    "torchmetrics": "evaluation",
    "torchvision": "vision",
    "whisper": "evaluation",
}


class MissingExtraError(ImportError):
    """An optional dependency is absent or does not load; the message names the extra that brings it."""


def require(module: str) -> ModuleType:
    """Imports an optional dependency, or one of its submodules (``"whisper.normalizers"``).

    Raises:
        MissingExtraError: it is not installed, or it is and does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise missing(module, error) from error


def missing(module: str, cause: Exception) -> MissingExtraError:
    """What to raise where an optional dependency does not load."""
    extra = EXTRAS[module.partition(".")[0]]
    return MissingExtraError(
        f"{module} could not be imported ({cause}); install it with: pip install 'tokenthrift[{extra}]'"
    )
